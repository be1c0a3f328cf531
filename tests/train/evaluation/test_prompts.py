from oneword.train.evaluation.prompts import without_word


def test_a_prompt_without_its_word_is_as_in_the_paper() -> None:
    assert without_word("a photo of a {} on the moon") == "a photo of on the moon"
    assert without_word("a red star in the style of {}") == "a red star"
