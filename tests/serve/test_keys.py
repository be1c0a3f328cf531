"""Keys belong to tenants; a key file that is broken says where, and never replaces one that works."""

import hashlib
import inspect
from pathlib import Path

import pytest

from oneword.engines.errors import FileError, UsageError
from oneword.serve.keys import Keys, Tenant, new_key


def entry(name: str, key: str, lines: str = "") -> str:
    return f'[{name}]\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n{lines}\n'


def test_a_key_belongs_to_its_tenant_and_no_other_key_to_anybody(tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(
        entry("alice", "a-key", "max_words = 3\nmax_bytes = 1000\npixel_steps_per_minute = 7")
        + entry("bob", "b-key")
        + entry('"carol@example.com"', "schlüssel"),
        encoding="utf-8",
    )
    keys = Keys.read(tmp_path / "keys.toml")

    assert keys.tenant("a-key") == Tenant("alice", max_words=3, max_bytes=1000, pixel_steps_per_minute=7)
    assert keys.tenant("b-key") == Tenant("bob", max_words=1000, max_bytes=100 * 2**20, pixel_steps_per_minute=None)
    assert keys.tenant("schlüssel") == Tenant("carol@example.com")
    for key in ("", "a-ke", "a-key ", "A-KEY", hashlib.sha256(b"a-key").hexdigest(), "\udcff", "x" * 1_000_000):
        assert keys.tenant(key) is None


def test_every_entry_is_compared_whichever_one_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys.toml").write_text("".join(entry(f"tenant{i}", f"key{i}") for i in range(20)))
    keys = Keys.read(tmp_path / "keys.toml")
    compared: list[bytes] = []

    def compare(entry: bytes, digest: bytes) -> bool:
        compared.append(entry)
        return entry == digest

    monkeypatch.setattr("oneword.serve.keys.hmac.compare_digest", compare)

    for key in ("key0", "key19", "unknown"):
        compared.clear()
        keys.tenant(key)
        assert len(set(compared)) == 20


def test_a_new_key_is_long_random_and_not_in_the_file(tmp_path: Path) -> None:
    made = [new_key(name) for name in ("alice", "bob", "carol@example.com", "x.y")]
    (tmp_path / "keys.toml").write_text("\n".join(lines for _, lines in made))
    keys = Keys.read(tmp_path / "keys.toml")

    assert [tenant.name for key, _ in made if (tenant := keys.tenant(key))] == [
        "alice",
        "bob",
        "carol@example.com",
        "x.y",
    ]
    for key, _ in made:
        assert key.startswith("ow_")
        assert len(key) >= 43  # 256 bits in base64
        assert key[3:] not in (tmp_path / "keys.toml").read_text()
    with pytest.raises(UsageError, match=r"the name '\.\./x' is not allowed: 1 to 64 letters, digits"):
        new_key("../x")


def test_a_reload_replaces_all_keys_or_none(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(entry("alice", "old"))
    keys = Keys.read(file)

    file.write_text(entry("alice", "new") + "max_words = ?")
    with pytest.raises(FileError, match=r"keys.toml is not valid TOML: .*line 4"):
        keys.reload()
    assert (keys.tenant("old"), keys.tenant("new")) == (Tenant("alice"), None)
    file.unlink()
    with pytest.raises(UsageError, match="there is no key file"):
        keys.reload()
    assert keys.tenant("old") == Tenant("alice")

    file.write_text(entry("alice", "new"))
    keys.reload()
    assert (keys.tenant("old"), keys.tenant("new")) == (None, Tenant("alice"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no keys: ti-serve --new-key NAME prints an entry"),
        ("x = 1", "x is outside of a table: start one with [NAME]"),
        ("[a]", "sha256 of [a] is not 64 hexadecimal digits"),
        ("[a]\nsha256 = 'abc'", "sha256 of [a] is not 64 hexadecimal digits"),
        ("[a]\nsha256 = 5", "sha256 of [a] is not 64 hexadecimal digits"),
        (entry("a", "k", "max_word = 5"), "[a] has the unknown field 'max_word', but may have only sha256, max_words"),
        (entry("a", "k", "max_words = -1"), "max_words of [a] is -1, but must be a whole number, 0 or more"),
        (entry("a", "k", "max_words = true"), "max_words of [a] is True, but must be a whole number, 0 or more"),
        (entry("a", "k", "max_bytes = 1.5"), "max_bytes of [a] is 1.5, but must be a whole number, 0 or more"),
        (entry("a", "k") + entry("b", "k"), "[a] and [b] have the same key, each needs its own"),
        (entry("'../a'", "k"), "the name '../a' is not allowed"),
        (entry("'" + "a" * 65 + "'", "k"), "is not allowed: 1 to 64 letters"),
        ("[a]\n[a]", "is not valid TOML"),
        ("a = " + "[" * 10_000, "is not valid TOML"),
    ],
)
def test_a_broken_key_file_is_one_line_that_says_where(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "keys.toml").write_text(text)

    with pytest.raises(FileError) as caught:
        Keys.read(tmp_path / "keys.toml")

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileError, match="is not a text file in UTF-8"):
        Keys.read(tmp_path / "keys.toml")
    with pytest.raises(FileError, match="cannot read the key file"):
        Keys.read(tmp_path)


def test_the_example_in_the_manual_of_the_file_works(tmp_path: Path) -> None:
    manual = inspect.getdoc(__import__("oneword.serve.keys", fromlist=["x"])) or ""
    example = manual[manual.index("[alice]") : manual.index("A key is random")]
    (tmp_path / "keys.toml").write_text(inspect.cleandoc(example))

    assert len(Keys.read(tmp_path / "keys.toml")) == 1
