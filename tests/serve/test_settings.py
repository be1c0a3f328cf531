"""The server's settings are checked when they are made, before anything is opened."""

from pathlib import Path
from typing import Any

import pytest

from oneword.engines.errors import UsageError
from oneword.serve.command import command
from oneword.serve.settings import Settings, is_loopback

BUNDLE = Path("bundle")


def test_by_default_only_this_machine_can_reach_the_server_and_words_are_in_the_users_data_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    settings = Settings(BUNDLE)

    assert settings.host == "127.0.0.1"
    assert settings.words == str(tmp_path / "oneword" / "words")
    monkeypatch.delenv("XDG_DATA_HOME")
    assert Settings(BUNDLE).words == str(Path.home() / ".local" / "share" / "oneword" / "words")


def test_help_shows_the_default_folders_of_words_and_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    shown = {option.name: Path(str(getattr(option, "show_default", ""))).expanduser() for option in command.params}
    settings = Settings(BUNDLE, port=8001)

    assert str(shown["words"]) == settings.words
    assert str(shown["jobs"]).replace("<PORT>", "8001") == str(settings.jobs_folder)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.5", "example.com", "localhost.example.com", "127.evil.org"]
)
def test_other_hosts_are_refused_without_keys(host: str) -> None:
    with pytest.raises(
        UsageError, match=f"--host {host} can be reached from other machines: protect it with --keys FILE"
    ):
        Settings(BUNDLE, host=host)

    assert Settings(BUNDLE, host=host, keys=Path("keys.toml")).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1", "[::1]"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert is_loopback(host)
    assert Settings(BUNDLE, host=host).keys is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"deadline": 0.0}, "--deadline is 0 s, but must be more than 0 and finite"),
        ({"port": 65536}, "--port is 65536, but must be 0 to 65535"),
        ({"words": ""}, "--words is empty: pass a folder or a URL"),
        ({"max_rows": 0}, "--max-rows is 0, but must be at least 1"),
        ({"threads": 0}, "--threads is 0, but must be at least 1"),
        ({"engine": "magic"}, "--engine is 'magic', but must be one of auto, "),
        ({"max_wait": 0.0}, "--max-wait is 0 s, but must be more than 0 and finite"),
        ({"drain_seconds": 0.0}, "drain_seconds is 0 s, but must be more than 0 and finite"),
        ({"body_seconds": float("nan")}, "body_seconds is nan s, but must be more than 0 and finite"),
        ({"write_seconds": float("inf")}, "write_seconds is inf s, but must be more than 0 and finite"),
        ({"trusted_proxies": ("nginx",)}, "--trusted-proxy is 'nginx', but must be an address such as 10.0.0.5"),
        ({"trusted_proxies": ("10.0.0.1/8",)}, "--trusted-proxy is '10.0.0.1/8', but must be an address"),
        ({"response_format": "png"}, "--response-format is 'png', but must be b64_json or url"),
        ({"allowed_hosts": ("oneword:8000",)}, "--allow-host is 'oneword:8000', but must be a name without a port"),
        (
            {"allowed_origins": ("*",)},
            "--allow-origin is '*', but must be an origin as browsers send it, in lower case,",
        ),
        ({"allowed_origins": ("null",)}, "--allow-origin is 'null'"),
        ({"allowed_origins": ("https://example.com/",)}, "--allow-origin is 'https://example.com/'"),
        ({"allowed_origins": ("https://Example.com",)}, "--allow-origin is 'https://Example.com'"),
        ({"allowed_origins": ("https://example.com:443",)}, "--allow-origin is 'https://example.com:443'"),
        ({"allowed_origins": ("http://me@example.com",)}, "--allow-origin is 'http://me@example.com'"),
        ({"allowed_origins": ("https://",)}, "--allow-origin is 'https://'"),
        ({"public_url": "example.com"}, "--public-url is 'example.com', but must be an address such as https://"),
        ({"public_url": "https://me@example.com"}, "--public-url is 'https://me@example.com'"),
        ({"public_url": "https://example.com:x"}, "--public-url is 'https://example.com:x'"),
        ({"public_url": "https://[::1"}, "--public-url is"),
        ({"public_url": "ftp://example.com"}, "--public-url is"),
        ({"root_path": "oneword"}, "--root-path is 'oneword', but must be a path such as /oneword"),
        ({"root_path": "/oneword/"}, "--root-path is '/oneword/'"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_its_option(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Settings(BUNDLE, **setting)

    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_settings_of_a_server_behind_a_proxy_are_accepted() -> None:
    settings = Settings(
        BUNDLE,
        public_url="https://example.com:8443/pictures",
        root_path="/pictures",
        trusted_proxies=("10.0.0.0/8", "::1"),
    )

    assert settings.root_path == "/pictures"


def test_the_time_to_finish_work_has_no_limit_unless_one_is_given() -> None:
    assert Settings(BUNDLE).drain_seconds is None
    assert Settings(BUNDLE, drain_seconds=5.0).drain_seconds == 5
