"""The record of ``snkernels demo``: what it found, and where.

    python -m benchmarks.demo

writes table, CSV, plot and record.json into benchmarks/results/demo/, from which the README quotes.
"""

import datetime
import json
import shutil
import tempfile
from pathlib import Path

from benchmarks import machine
from benchmarks.schema import RESULTS
from snkernels import demo


def main() -> None:
    """Run the demo with its defaults and keep all it wrote but the checkpoint."""
    commit, dirty = machine.commit()
    record = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m benchmarks.demo",
        "commit": commit,
        "dirty": dirty,
        "machine": machine.describe(),
        "versions": machine.versions(),
    }
    target = RESULTS / "demo"
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        demo.run(folder)
        record["demo"] = json.loads(Path(folder, demo.RECORD).read_text(encoding="utf-8"))
        for name in (demo.TABLE, demo.CSV, demo.PLOT):
            shutil.copy(Path(folder, name), target / name)
    (target / "record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
