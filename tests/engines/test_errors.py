from oneword.engines.errors import one_line


def test_another_packages_message_becomes_one_line_of_limited_length() -> None:
    assert one_line(ValueError("  no such\n\tkernel: ")) == "no such kernel:"
    assert one_line(ValueError("a" * 1000)) == "a" * 300
    assert one_line(ValueError("a" * 1000), limit=None) == "a" * 1000


def test_an_error_without_a_message_becomes_the_name_of_its_type() -> None:
    assert one_line(StopIteration()) == "StopIteration"
    assert one_line(ValueError("\n")) == "ValueError"
