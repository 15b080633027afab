import sys
from pathlib import Path

# Last, so that an installed snkernels comes before its sources.
sys.path.append(str(Path(__file__).parents[2]))
