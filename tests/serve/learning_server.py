"""A server's jobs in a process of their own, to be killed: `python learning_server.py STORE FOLDER MODEL DIGEST`."""

import asyncio
import sys
from pathlib import Path

from oneword.serve.jobs import Jobs


async def main() -> None:
    store, folder, model, digest = sys.argv[1:]
    options = {"max_lost": 1000, "retry_seconds": 0.05, "progress_seconds": 0.0, "checkpoint_every": 1}
    jobs = Jobs(store, Path(folder), model, digest, **options)
    await jobs.start()
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
