"""The static kernel report: what is known of every kernel on a machine without a GPU."""
