"""Prompts against transformers' CLIPTokenizer, OpenAI's slow BPE, A1111's examples and diffusers' loader."""

import itertools
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
from hypothesis import example, given, reject, settings
from hypothesis import strategies as st
from transformers import BertTokenizer, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from oneword.engines.errors import BundleError, OnewordError, UsageError
from oneword.runtime.bundle import Encoder
from oneword.runtime.concept import Concept
from oneword.runtime.prompt import (
    Chunks,
    Part,
    Tokenizer,
    UnknownWord,
    Vocabulary,
    encode_ids,
    named_words,
    used_words,
    weighted_parts,
)
from oneword.runtime.prompt_schedule import prompts_by_step
from oneword.runtime.request import Request

CORPUS = (
    "a photo of the small red and blue striped toy on a wooden table in the style of an old painting party artist "
    "castle mountain river dog's cat's don't we're 12 34 2024 été naïve straße sunset over water with clouds "
) * 3
LENGTH = 20
BYTES = bytes_to_unicode()


def _bpe_files(folder: Path) -> Path:
    """Writes a byte-level BPE whose merges come from a few sentences."""
    words = Counter("".join(BYTES[b] for b in word.encode()) for word in CORPUS.split())
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < 250:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        pieces = {word: _merged(parts, best) for word, parts in pieces.items()}
    letters = list(BYTES.values())
    tokens = [*letters, *(x + "</w>" for x in letters), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    return folder


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for part in parts:
        if result and (result[-1], part) == pair:
            result[-1] += part
        else:
            result.append(part)
    return result


@pytest.fixture(scope="module")
def clip_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    folder = _bpe_files(tmp_path_factory.mktemp("bpe"))
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(clip_tokenizer: CLIPTokenizer) -> Tokenizer:
    return _tokenizer(clip_tokenizer)


def _tokenizer(clip_tokenizer: CLIPTokenizer) -> Tokenizer:
    return Tokenizer.read(
        Path(clip_tokenizer.name_or_path),
        Encoder(
            graph="text_encoder",
            table="t",
            tokenizer="t",
            vocab_size=len(clip_tokenizer),
            width=8,
            hidden_width=8,
            length=LENGTH,
            bos_id=clip_tokenizer.bos_token_id,
            eos_id=clip_tokenizer.eos_token_id,
            pad_id=clip_tokenizer.pad_token_id,
            layers=(1,),
            default_layer=1,
        ),
    )


NOTHING = Vocabulary({})
WORDS = [
    *CORPUS.split(),
    *("Été", "É", "ça", "人形", "кот", "😀", "e\u0301", "ﬁne", "İstanbul", "x²", "\u00a0", "don't", "we'll", "it's"),
    *("--", "...", ",", "!", "#1", "a.b", "100%", "§", "&amp;", "_", "'", "PARTY", "Red", "\t", "\n", "\u3000", "<3"),
]


def _prompts(count: int) -> Iterator[str]:
    choice = random.Random(4)
    for _ in range(count):
        words = choice.choices(WORDS, k=choice.randint(0, 12))
        yield "".join(word + choice.choice(["", " ", " ", ", "]) for word in words)


def test_two_thousand_prompts_have_the_ids_of_transformers(tokenizer: Tokenizer, clip_tokenizer: CLIPTokenizer) -> None:
    for prompt in _prompts(2_000):
        expected = clip_tokenizer(prompt, padding="max_length", truncation=True).input_ids
        tokens = encode_ids(prompt, tokenizer, NOTHING)
        untruncated = clip_tokenizer(prompt, add_special_tokens=False).input_ids
        assert len(tokens.input_ids) == max(1, -(-len(untruncated) // (LENGTH - 2)))
        assert tokens.input_ids[0].tolist() == expected, prompt
        assert tokens.input_ids[:, 1:-1].ravel()[: len(untruncated)].tolist() == untruncated


def test_ids_match_those_of_the_slow_bpe_of_clips_release(tmp_path: Path) -> None:
    stored = json.loads((Path(__file__).parent / "clip_bpe.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(stored["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(stored["merges"]) + "\n")
    clip_tokenizer = CLIPTokenizer.from_pretrained(tmp_path, model_max_length=77)
    clip_tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer = _tokenizer(clip_tokenizer)
    assert len(stored["prompts"]) > 300
    for prompt, ids in stored["prompts"]:
        assert tokenizer.ids(prompt) == ids, prompt


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        (r"\m/ \\m/ a\:b (c\)", [(r"m/ \m/ a:b ", 1.0), ("c)", 1.1)]),
        ("a\\", [("a", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.5730000000000004),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641000000000006),
                (".", 1.1),
            ],
        ),
        ("a:b) c]", [("a:b) c]", 1.0)]),
        ("(a:-0.5)", [("a", -0.5)]),
        ("", []),
    ],
)
def test_weights_are_parsed_as_in_a1111s_examples(prompt: str, parts: list[tuple[str, float]]) -> None:
    result = [part for part in weighted_parts(prompt) if part is not None]
    assert [part.text for part in result] == [text for text, _ in parts]
    assert [part.weight for part in result] == pytest.approx([weight for _, weight in parts])


def test_break_starts_a_new_chunk_but_not_in_breakfast(tokenizer: Tokenizer) -> None:
    assert weighted_parts("a BREAK b") == [Part("a", 1.0), None, Part("b", 1.0)]
    assert weighted_parts("BREAKFAST a") == [Part("BREAKFAST a", 1.0)]
    tokens = encode_ids("red BREAK (blue:1.5)", tokenizer, NOTHING)
    alone = [encode_ids("red", tokenizer, NOTHING), encode_ids("(blue:1.5)", tokenizer, NOTHING)]
    np.testing.assert_array_equal(tokens.input_ids, np.concatenate([part.input_ids for part in alone]))
    np.testing.assert_array_equal(tokens.token_weights, np.concatenate([part.token_weights for part in alone]))
    assert len(encode_ids("red BREAK", tokenizer, NOTHING).input_ids) == 1


def test_only_the_tokens_of_weighted_words_have_a_weight(tokenizer: Tokenizer) -> None:
    tokens = encode_ids("a (red toy:1.5) on", tokenizer, NOTHING)
    ids = [tokenizer.ids(text) for text in ("a", "red toy", "on")]
    content = [1.0] * len(ids[0]) + [1.5] * len(ids[1]) + [1.0] * len(ids[2])
    expected = [1.0, *content, *[1.0] * (LENGTH - 1 - len(content))]
    np.testing.assert_array_equal(tokens.token_weights, [np.float32(expected)])
    assert (encode_ids("a red toy", tokenizer, NOTHING).token_weights == 1).all()


TOY = {"<toy>": (900, 901), "<toy-2>": (902,), "art": (903,), "*": (904,), "S*": (905,), "старый": (906,)}


def vocabulary(ids: Mapping[str, Sequence[int]]) -> Vocabulary:
    """Words of as many vectors as they have ids."""
    rows = {token: np.random.default_rng(sum(row)).normal(size=(len(row), 4)) for token, row in ids.items()}
    return Vocabulary({token: Concept(token, {"text_encoder": rows[token].astype(np.float32)}) for token in ids})


def placed(tokens: Chunks, ids: Mapping[str, Sequence[int]]) -> npt.NDArray[np.int64]:
    """The prompt's ids [chunks, T], with these of each word."""
    return tokens.placed(np.array(ids[concept.token]) for concept in tokens.concepts)


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a photo of <toy>", ["a photo of", 900, 901]),
        ("<toy><toy>", [900, 901, 900, 901]),
        ("x<toy>y", ["x", 900, 901, "y"]),
        ("<TOY> and <toy-2>", [900, 901, "and", 902]),
        ("embedding:toy, red", [900, 901, ", red"]),
        ("embedding:<toy>, red", [900, 901, ", red"]),
        ("(embedding:toy-2:1.2)", [902]),
        ("embedding:toys", [900, 901, "s"]),
        ("toy", ["toy"]),
        ("art party artist Art, art.", [903, "party artist", 903, ",", 903, "."]),
        ("<art> embedding:art", [903, 903]),
        ("a * and S* but 5*3", ["a", 904, "and", 905, "but 5*3"]),
        ("старый кот", [906, "кот"]),
        ("a <3 b > c", ["a <3 b > c"]),
        ("\\(<toy>\\)", ["(", 900, 901, ")"]),
        ("<|endoftext|>", ["<|endoftext|>"]),
    ],
)
def test_learned_words_are_inserted_where_the_prompt_names_them(
    tokenizer: Tokenizer, prompt: str, pieces: list[str | int]
) -> None:
    expected = [id_ for piece in pieces for id_ in ([piece] if isinstance(piece, int) else tokenizer.ids(piece))]
    tokens = placed(encode_ids(prompt, tokenizer, vocabulary(TOY)), TOY)
    row = tokens[0].tolist()
    assert row[1 : 1 + len(expected)] == expected
    assert row[1 + len(expected)] == tokenizer.eos_id


@pytest.mark.parametrize("prompt", ["<toyy>", "embedding:nothing", "a <cat:x:0.8>", "(<toy-3>:1.2)"])
def test_an_unknown_word_is_an_error_that_lists_similar_ones(tokenizer: Tokenizer, prompt: str) -> None:
    with pytest.raises(UsageError, match=r"no word .* is loaded, similar words: .*(<toy>|art)"):
        encode_ids(prompt, tokenizer, vocabulary(TOY))
    with pytest.raises(UsageError, match="add its file with --concept"):
        encode_ids(prompt, tokenizer, NOTHING)


@pytest.mark.parametrize("name", ["lora:foo:0.8", "lyco:foo", "LoRA:my style:1"])
def test_a_lora_in_a_prompt_is_refused_with_what_to_do_with_it(tokenizer: Tokenizer, name: str) -> None:
    message = (
        f"'<{name}>', but a LoRA cannot be used in a prompt: fuse it when you export, with ti-export --lora FILE:0.8"
    )
    for refuse in (
        lambda prompt: encode_ids(prompt, tokenizer, vocabulary(TOY)),
        lambda prompt: Request("a cat", negative_prompt=prompt),
        named_words,
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            refuse(f"a (<toy> <{name}>:1.2), [a:b:0.5]")


def test_a_hypernetwork_in_a_prompt_is_refused() -> None:
    with pytest.raises(
        UsageError, match="has '<hypernet:foo:1>', but a hypernetwork cannot be used in a prompt: leave"
    ):
        Request("a cat <hypernet:foo:1>")


def test_a_word_of_many_vectors_is_never_split(tokenizer: Tokenizer) -> None:
    ids = {"<long>": range(900, 910), "<huge>": range(900, 919)}
    words = vocabulary(ids)
    tokens = placed(encode_ids("<long> <long>", tokenizer, words), ids)
    assert tokens.shape == (2, LENGTH)
    assert tokens[:, 1:11].tolist() == [list(range(900, 910))] * 2
    with pytest.raises(UsageError, match="19 vectors does not fit this encoder's 18 tokens"):
        encode_ids("<huge>", tokenizer, words)


def test_learned_ids_do_not_move_the_eos_index(tokenizer: Tokenizer) -> None:
    ids = {"<toy>": (tokenizer.eos_id + 1, tokenizer.eos_id + 2)}
    tokens = encode_ids("red <toy> blue", tokenizer, vocabulary(ids))
    expected = 1 + len(tokenizer.ids("red")) + 2 + len(tokenizer.ids("blue"))
    assert tokens.eos_index.tolist() == [expected]
    assert placed(tokens, ids)[0].argmax() != expected  # where legacy CLIP would pool


def test_ids_match_those_of_diffusers_after_load_textual_inversion(tiny_model: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    width = pipeline.text_encoder.get_input_embeddings().weight.shape[1]
    vocab = len(pipeline.tokenizer)
    words: dict[str, tuple[int, ...]] = {}
    pipeline.tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    for token, count in (("<toy>", 1), ("<ring-2>", 3), ("sks-dog", 2)):
        rows = np.random.default_rng(count).normal(0, 0.1, (count, width)).astype(np.float32)
        safetensors.numpy.save_file({token: rows}, tmp_path / f"{count}.safetensors")
        pipeline.load_textual_inversion(tmp_path / f"{count}.safetensors")
        words[token] = tuple(range(vocab, vocab + count))
        vocab += count
    clip_tokenizer = pipeline.tokenizer
    clip_tokenizer.name_or_path = str(tmp_path)
    tokenizer = _tokenizer(clip_tokenizer)
    choice = random.Random(8)
    for _ in range(300):
        parts = choice.choices([*words, "red", "photo of a", ",", "star!", "Blue cat's"], k=choice.randint(1, 7))
        prompt = " ".join(parts)
        converted = pipeline.maybe_convert_prompt(prompt, clip_tokenizer)
        expected = clip_tokenizer(converted, add_special_tokens=False).input_ids
        tokens = encode_ids(prompt, tokenizer, vocabulary(words))
        ids = placed(tokens, words).tolist()
        rows = [row[1:end] for row, end in zip(ids, tokens.eos_index.tolist(), strict=True)]
        assert list(itertools.chain(*rows)) == expected, prompt


def test_berts_wordpiece_ids_match_those_of_transformers(tmp_path: Path) -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "ca", "##t", "##s", ",", "ete"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    bert_tokenizer = BertTokenizer.from_pretrained(tmp_path, model_max_length=LENGTH)
    bert_tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = Encoder(
        graph="text_encoder",
        table="t",
        tokenizer="t",
        vocab_size=len(pieces),
        width=8,
        hidden_width=8,
        length=LENGTH,
        bos_id=bert_tokenizer.cls_token_id,
        eos_id=bert_tokenizer.sep_token_id,
        pad_id=bert_tokenizer.pad_token_id,
        layers=(1,),
        default_layer=1,
    )
    tokenizer = Tokenizer.read(tmp_path, encoder)
    for prompt in ("A photo, of cats", "Été cat", "unknown", ""):
        expected = bert_tokenizer(prompt, padding="max_length").input_ids
        assert encode_ids(prompt, tokenizer, NOTHING).input_ids.tolist() == [expected]


def test_invalid_prompts_are_refused_with_the_reason(tokenizer: Tokenizer) -> None:
    for prompt, message in [
        ("(a:1.2.3)", "weight '1.2.3' is not a number"),
        ("(a:1e)" + "(" * 60 + "b", "the weight of .* must be -100 to 100"),
        ("(a:999)", "the weight of 'a' is 999, but must be"),
        ("a" * 20_001, "20001 characters, but may have at most 20000: "),
    ]:
        with pytest.raises(UsageError, match=message):
            encode_ids(prompt, tokenizer, NOTHING)


def test_a_missing_or_broken_tokenizer_is_reported(
    tokenizer: Tokenizer, tmp_path: Path, clip_tokenizer: CLIPTokenizer
) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    broken = CLIPTokenizer.from_pretrained(clip_tokenizer.name_or_path, model_max_length=LENGTH)
    for folder in (tmp_path, tmp_path / "absent"):
        broken.name_or_path = str(folder)
        with pytest.raises(BundleError, match=r"tokenizer.json cannot be read .* export the bundle again"):
            _tokenizer(broken)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from([*TOY, *"()[]\\:<>,. ", "BREAK", "1.2", "embedding:", "red", "é", "\u0301"])))
def test_any_prompt_becomes_valid_ids_or_a_one_line_error(tokenizer: Tokenizer, pieces: list[str]) -> None:
    tokens = _ids_or_message("".join(pieces), tokenizer)
    if isinstance(tokens, str):
        assert "\n" not in tokens
        return
    chunks, length = tokens.input_ids.shape
    assert length == LENGTH
    assert tokens.token_weights.shape == (chunks, LENGTH)
    assert np.isfinite(tokens.token_weights).all()
    assert (placed(tokens, TOY) >= 0).all()
    assert (tokens.input_ids[:, :1] == tokenizer.frame.head).all()
    assert (tokens.input_ids[np.arange(chunks), tokens.eos_index] == tokenizer.eos_id).all()


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=60))
def test_any_text_becomes_ids_or_a_one_line_error(tokenizer: Tokenizer, text: str) -> None:
    tokens = _ids_or_message(text, tokenizer)
    if isinstance(tokens, str):
        assert "\n" not in tokens
    else:
        assert tokens.input_ids.max() < 907


def _ids_or_message(prompt: str, tokenizer: Tokenizer) -> Chunks | str:
    try:
        return encode_ids(prompt, tokenizer, vocabulary(TOY))
    except OnewordError as error:
        return str(error)


@pytest.mark.parametrize(
    ("prompt", "bracketed", "embeddings", "bare"),
    [
        ("a photo", set(), set(), {"a", "photo"}),
        ("(<Toy>:1.2) BREAK [<gem>]", {"Toy", "gem"}, set(), set()),
        ("embedding:<toy>, EMBEDDING:gem.", {"toy"}, {"gem."}, {"gem.", "EMBEDDING"}),
        ("embedding:a-embedding:b", set(), {"a-embedding", "b"}, {"embedding", "a-embedding", "b"}),
        ("<toy>gem x-y", {"toy"}, set(), {"gem", "x-y", "y"}),
        ("\\(toy\\)", set(), set(), {"toy"}),
        ("<a b> <> < c>", set(), set(), {"a", "b", "c"}),
    ],
)
def test_the_names_in_a_prompt_are_found(
    prompt: str, bracketed: set[str], embeddings: set[str], bare: set[str]
) -> None:
    assert named_words(prompt) == (bracketed, embeddings, bare)


@pytest.mark.parametrize("prompt", ["(a:9999)", "(a:1.2.3)", "\ud800", "a" * 20_001])
def test_the_names_of_a_malformed_prompt_are_a_usage_error(prompt: str) -> None:
    with pytest.raises(UsageError):
        named_words(prompt)


TOKENS = ["<a>", "<A>", "a", "A", "<b>", "a-embedding", "ab", "a.b", "b.", "-b", "embedding", "É", "<é>"]
PIECES = [
    "<",
    ">",
    "a",
    "A",
    "b",
    "embedding:",
    "Embedding:",
    "-",
    ".",
    " ",
    "(",
    ")",
    ":1.1)",
    "é",
    "É",
    "BREAK",
    "\\",
]


@settings(max_examples=2_000, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.sets(st.sampled_from(TOKENS)))
@example("a-embedding:<a>", {"<a>", "a-embedding"})
def test_no_word_is_used_whose_name_was_not_found(prompt: str, tokens: set[str]) -> None:
    words = {token: Concept(token, {"text_encoder": np.ones((1, 4), np.float32)}) for token in tokens}
    try:
        used = used_words(prompt, Vocabulary(words, ignore_case=True), lambda piece: True)
    except UsageError:  # the prompt is malformed: "(a:.)"
        reject()

    names = named_words(prompt)
    for concept in used:
        bare = concept.token.strip("<>").lower()
        prefixes = [name for name in names.embeddings | names.bare if name.lower().startswith(bare)]
        assert bare in {name.lower() for name in names.bracketed} or prefixes, (prompt, concept.token)


@pytest.mark.parametrize(
    "prompt",
    ["EasyNegative", "easynegative, bad", "EASYNEGATIVE", "embedding:easynegative", "<EASYnegative>", "(easyNegative)"],
)
def test_a_word_is_found_whatever_the_case_of_its_name(prompt: str) -> None:
    """A1111 finds a word by the ids of its name, and CLIP's tokenizer lower-cases it."""
    word = Concept("EasyNegative", {"text_encoder": np.ones((1, 4))})

    assert used_words(prompt, Vocabulary({"EasyNegative": word}, ignore_case=True), lambda piece: False) == [word]


@pytest.mark.parametrize("tokens", itertools.permutations(["Toy", "TOY", "toys", "<Gem>", "gem"], 5))
def test_of_words_that_differ_in_case_the_one_with_exactly_the_name_or_else_the_first_in_the_alphabet_is_meant(
    tokens: Sequence[str],
) -> None:
    words = {token: Concept(token, {"text_encoder": np.full((1, 4), i + 1.0)}) for i, token in enumerate(tokens)}
    vocabulary = Vocabulary(words, ignore_case=True)
    for name, token in (("TOY", "TOY"), ("Toy", "Toy"), ("toy", "TOY"), ("toYS", "toys"), ("GEM", "gem")):
        assert [word.token for word in used_words(f"a {name}", vocabulary, lambda piece: False)] == [token]
    for name, token in (("<toy>", "TOY"), ("<gem>", "gem"), ("<Gem>", "<Gem>"), ("embedding:TOYS", "toys")):
        assert [word.token for word in used_words(f"a {name}", vocabulary, lambda piece: False)] == [token]


def test_used_words_are_those_that_the_tokenizer_is_given(tokenizer: Tokenizer) -> None:
    tokens = ["<toy>", "gem", "<small>", "red-hat"]
    words = {token: Concept(token, {"text_encoder": np.full((1, 4), i + 1.0)}) for i, token in enumerate(tokens)}
    prompt = "a <toy> and (embedding:gems:1.2), red-hat <|endoftext|> <toy>"

    used = used_words(prompt, Vocabulary(words), tokenizer.knows)

    assert [concept.token for concept in used] == ["<toy>", "gem", "red-hat", "<toy>"]
    assert [*encode_ids(prompt, tokenizer, Vocabulary(words)).concepts] == [
        words[t] for t in ("<toy>", "gem", "red-hat")
    ]


def test_without_bare_names_a_word_needs_brackets_or_embedding(tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary({"cat": Concept("cat", {"text_encoder": np.ones((1, 4))})}, bare_names=False)

    assert used_words("a cat", vocabulary, tokenizer.knows) == []
    assert len(used_words("a cat, <cat>, embedding:cat", vocabulary, tokenizer.knows)) == 2


def test_an_unknown_word_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(UnknownWord, match="no word '<Gem>' is loaded") as info:
        used_words("a <Gem>", NOTHING, tokenizer.knows)
    assert info.value.name == "<Gem>"
    with pytest.raises(UnknownWord) as info:
        used_words("embedding:Gem!", NOTHING, tokenizer.knows)
    assert info.value.name == "embedding:Gem!"


def instructions(call: Callable[[], object]) -> int:
    """How many instructions of Python a call executes."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("read", [weighted_parts, named_words, partial(prompts_by_step, steps=3)])
@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ("[", ""),
        ("(", ""),
        ("[a", "]"),
        ("(a", ":0.9)"),
        ("([a", ")]"),
        ("[:", "]"),
        ("[a|b", ""),
        ("[", ":1"),
        ("\\(", ""),
        ("a BREAK ", ""),
        ("{", "|"),
        ("<a", ""),
        ("embedding:a-", ""),
        (".", ""),
    ],
)
def test_reading_a_prompt_takes_work_in_proportion_to_its_length(
    read: Callable[[str], object], opening: str, closing: str
) -> None:
    """Four times the prompt takes at most five times the instructions; were it quadratic, it would take sixteen."""
    short, long = (opening * n + closing * n for n in (40, 160))
    assert instructions(lambda: read(long)) < 5 * instructions(lambda: read(short))


def test_bare_names_are_compared_with_those_of_known_lengths_only() -> None:
    class Words(dict[str, Concept]):
        looked_up = 0

        def get(self, token: str, default: Any = None) -> Any:
            self.looked_up += 1
            return super().get(token, default)

    words = Words(gem=Concept("gem", {"text_encoder": np.ones((1, 4))}))
    assert used_words("." * 1_000, Vocabulary(words, ignore_case=True), lambda piece: False) == []
    assert words.looked_up <= 2 * 1_000


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("([a)b]c", [("a", 1.0), ("b", 1 / 1.1), ("c", 1.0)]),
        ("(a[b)c]", [("a", 1.1), ("b", 1.0), ("c", 1 / 1.1)]),
        ("(a(b:2)[c", [("a", 1.1), ("b", 2.2), ("c", 1.0)]),
        ("a)b](c:3)", [("a)b]", 1.0), ("c", 3.0)]),
    ],
)
def test_round_and_square_brackets_count_independently_of_each_other(
    prompt: str, expected: list[tuple[str, float]]
) -> None:
    """By hand, as A1111 multiplies all parts since a bracket opened by its factor."""
    parts = [part for part in weighted_parts(prompt) if part is not None]
    assert [part.text for part in parts] == [text for text, _ in expected]
    assert [part.weight for part in parts] == pytest.approx([weight for _, weight in expected])
