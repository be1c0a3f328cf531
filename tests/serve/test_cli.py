"""`ti-serve` before it serves."""

from pathlib import Path

from oneword.serve.command import build_parts
from oneword.serve.settings import Settings


def test_checking_the_arguments_leaves_the_folder_of_jobs_to_the_server(tiny_bundle: Path, tmp_path: Path) -> None:
    settings = Settings(tiny_bundle, str(tmp_path / "words"), model="miniature", jobs=tmp_path / "jobs")

    for _ in range(2):
        build_parts(settings)  # the second would find the folder in use
