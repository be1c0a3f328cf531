"""Python imports this at its start where the benchmark puts this folder on the path: it changes the server's child."""

import json
import os

if "ONEWORD_BENCHMARK" in os.environ and "ONEWORD_HEARTBEAT" in os.environ:
    from benchmarks.served.changes import apply

    apply(json.loads(os.environ.pop("ONEWORD_BENCHMARK")))
