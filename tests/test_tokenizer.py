"""tokenizer.py: ids, chat templates, stop ids, saving, streaming. Parity with transformers on tiny tokenizers."""

import itertools
import json
import os
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_types import MiniBatch, Problem
from tokenizer import IncrementalDecoder, Tokenizer

CHATML = (
    "{%- for message in messages %}\n    {%- if loop.first and message.role != 'system' %}\n"
    "        {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}\n    {%- endif %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
MESSAGES = [{"role": "user", "content": 'Use [3, 5] & <b>"é"</b>.'}, {"role": "assistant", "content": "so\n 8 🙂"}]
TEXTS = [
    "",
    " ",
    "a  b\n\n\tc",
    "12345 ten",
    "日本語 🙂 é",
    "<|im_start|>user\nhi<|im_end|>\n",
    "x<|endoftext|><|im_end|>y",
    "\x00",
]


def write_checkpoint(folder, template=CHATML, config=None, generation=None, adds_bos=False, **tokenizer_config):
    """A checkpoint folder with a byte-level BPE tokenizer of 259 + some tokens and the ChatML tokens. No weights."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the user and the assistant use numbers " * 3], trainer)
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    if adds_bos:
        bos = ("<|endoftext|>", backend.token_to_id("<|endoftext|>"))
        backend.post_processor = tokenizers.processors.TemplateProcessing("<|endoftext|> $A", None, [bos])
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    settings |= {"chat_template": template, **tokenizer_config}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def id_of(folder, token):
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(token)


# ---- ids


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_equal_transformers(tmp_path, text):
    folder = write_checkpoint(tmp_path)
    ours, theirs = Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip, clean_up_tokenization_spaces=False)


def test_prompts_get_no_second_bos(tmp_path):
    """CHECKLIST 12: a tokenizer.json that adds a BOS does not add one to a prompt that a template has completed."""
    folder = write_checkpoint(tmp_path, "{{ bos_token }}" + CHATML, adds_bos=True, bos_token="<|endoftext|>")
    tokenizer, bos = Tokenizer.from_pretrained(folder), id_of(folder, "<|endoftext|>")
    assert AutoTokenizer.from_pretrained(folder).encode("hi")[0] == bos  # the fault is there to be made
    batch = MiniBatch.from_problems([Problem("p", MESSAGES[:1], None, "<think>")], tokenizer)
    assert batch.prompt_ids[0].count(bos) == 1
    assert batch.prompt_ids[0][0] == bos
    assert tokenizer.decode(batch.prompt_ids[0], skip_special_tokens=False) == batch.prompts[0]
    assert tokenizer.encode("") == []


def test_vocab_size_counts_ids_not_embedding_rows(tmp_path):
    """CHECKLIST 6: an id that only the embedding has is beyond vocab_size. Every id below may be produced."""
    folder = write_checkpoint(tmp_path, config={"vocab_size": 999})
    assert Tokenizer.from_pretrained(folder).vocab_size == id_of(folder, "<|im_end|>") + 1 < 999


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    folder = write_checkpoint(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    before = backend.encode("the numbers " * 9, add_special_tokens=False).ids
    backend.enable_truncation(4)
    backend.enable_padding(length=200)
    backend.save(str(folder / "tokenizer.json"))
    assert Tokenizer.from_pretrained(folder).encode("the numbers " * 9) == before


def test_half_a_surrogate_pair_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match=r"cannot encode .*ud83d"):
        Tokenizer.from_pretrained(write_checkpoint(tmp_path)).encode("\ud83d")


# ---- stop ids


@pytest.mark.parametrize("eos_token", ["<|im_end|>", {"__type": "AddedToken", "content": "<|im_end|>"}])
def test_every_stop_id_stops(tmp_path, eos_token):
    """CHECKLIST 9: the ids of generation_config.json (a list), config.json (an int) and tokenizer_config.json."""
    folder = write_checkpoint(
        tmp_path, config={"eos_token_id": 7}, generation={"eos_token_id": [5, 3]}, eos_token=eos_token
    )
    assert Tokenizer.from_pretrained(folder).eos_token_ids == (3, 5, 7, id_of(folder, "<|im_end|>"))


def test_stop_ids_without_an_eos_token(tmp_path):
    """CHECKLIST 9: each file alone is enough, as an int or a list."""
    for name, value in (("config", 4), ("config", [4]), ("generation", 4), ("generation", [4])):
        folder = write_checkpoint(
            tmp_path / f"{name}{type(value).__name__}", **{name: {"eos_token_id": value}}, eos_token=None
        )
        assert Tokenizer.from_pretrained(folder).eos_token_ids == (4,)


def test_generation_config_leaks_nothing_else(tmp_path):
    """CHECKLIST 5: with and without the chat settings of generation_config.json, the tokenizer is the same."""
    plain = Tokenizer.from_pretrained(write_checkpoint(tmp_path / "plain", generation={"eos_token_id": 5}))
    loud = {
        "eos_token_id": 5,
        "repetition_penalty": 1.1,
        "top_k": 20,
        "temperature": 0.7,
        "pad_token_id": 9,
        "bos_token_id": 8,
    }
    chatty = Tokenizer.from_pretrained(write_checkpoint(tmp_path / "chatty", generation=loud))

    def public(tokenizer):
        return {name: value for name, value in vars(tokenizer).items() if not name.startswith("_")}

    assert public(plain) == public(chatty)


def test_pad_falls_back_to_the_config_and_then_to_a_stop_id(tmp_path):
    assert Tokenizer.from_pretrained(write_checkpoint(tmp_path / "a")).pad_token_id == id_of(
        tmp_path / "a", "<|endoftext|>"
    )
    folder = write_checkpoint(tmp_path / "b", pad_token=None, config={"pad_token_id": 6})
    assert Tokenizer.from_pretrained(folder).pad_token_id == 6
    folder = write_checkpoint(tmp_path / "c", pad_token=None)
    assert Tokenizer.from_pretrained(folder).pad_token_id == id_of(folder, "<|im_end|>")


# ---- tokens that only a small file declares

LETTERS = "abcdefghijklmnopqrstuvwxyz<>_ "
TOKEN = {"content": "<im>", "lstrip": False, "rstrip": True, "normalized": False, "single_word": False}


def write_words(folder, tokenizer_config, added=(), pre_tokenizer=None, **files):
    """A tokenizer with the tokens <eos> (31), <im> (32), <x y> (33) in its vocabulary only, unless `added` has them."""
    vocabulary = {letter: i for i, letter in enumerate(["\u0120", *LETTERS.replace(" ", ""), "\u010a"])}
    vocabulary |= {"<eos>": 31, "<im>": 32, "<x y>": 33}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizer or tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_tokens(list(added))
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", **tokenizer_config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def assert_as_transformers(folder, *more):
    ours, theirs = Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("<eos>", "<im>", "<x y>", "<new>", "a <im> b", "a<x y> <im>  <eos>b <new>\n", *more):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids, text
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), (text, skip)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)
    return ours


DECLARED = {
    "a named token": {"bos_token": "<im>"},
    "an object with flags": {"bos_token": {"__type": "AddedToken", "special": True, **TOKEN}},
    "a name of the model's own": {"image_token": "<im>"},
    "extra_special_tokens, a list": {"extra_special_tokens": ["<im>", "<x y>"]},
    "extra_special_tokens, names": {"extra_special_tokens": {"image_token": "<im>"}},
    "additional_special_tokens": {"additional_special_tokens": ["<x y>", {"__type": "AddedToken", "special": True,
                                                                          **TOKEN}]},
    "added_tokens_decoder": {"added_tokens_decoder": {"32": {**TOKEN, "special": False}, "33": {
        "content": "<x y>", "special": True}}},
    "a new token with its id": {"added_tokens_decoder": {"34": {"content": "<new>", "special": True}}},
    "a new token without an id": {"additional_special_tokens": ["<new>"]},
    "a named token that another file calls by flags": {"bos_token": "<im>", "added_tokens_decoder": {"32": {
        **TOKEN, "special": False}}},
}  # fmt: skip


@pytest.mark.parametrize("form", DECLARED)
def test_tokens_of_the_tokenizer_config_are_registered(form, tmp_path):
    """CHECKLIST 68: A token that tokenizer.json has in its vocabulary only would be split into letters."""
    ours = assert_as_transformers(write_words(tmp_path / "a", DECLARED[form]))
    ours.save_pretrained(tmp_path / "b")
    assert_as_transformers(tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("special_tokens_map", {"bos_token": "<im>", "additional_special_tokens": ["<x y>"]}),
        ("special_tokens_map", {"bos_token": TOKEN, "pad_token": None}),
        ("special_tokens_map", {"image_token": "<im>"}),
        ("added_tokens", {"<im>": 32, "<new>": 34}),
        ("added_tokens", {"<eos>": 31}),
    ],
)
def test_tokens_of_the_older_files_are_registered(name, content, tmp_path):
    assert_as_transformers(write_words(tmp_path, {}, **{name: content}))
    # Newer folders repeat everything in tokenizer_config.json, and transformers then skips the older files.
    assert_as_transformers(write_words(tmp_path, {"added_tokens_decoder": {}}, **{name: content}))


def test_a_token_in_the_vocabulary_is_not_split_into_letters(tmp_path):
    """The smallest case: <im> is in the vocabulary, and a file calls it the BOS token."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<eos>": 2, "<im>": 3}, "a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    files = {"tokenizer.json": backend.to_str().encode(), "generation_config.json": b'{"eos_token_id": 2}'}
    files["tokenizer_config.json"] = b'{"bos_token": "<im>"}'
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert Tokenizer.from_pretrained(tmp_path).encode("<im>") == [3]
    assert Tokenizer.from_pretrained(tmp_path).encode("b <im> b") == [1, 3, 1]


def test_a_token_that_another_file_replaces_by_another_stays_a_token(tmp_path):
    """The newer name counts. transformers splits the older token into letters, and here it keeps its id."""
    folder = write_words(tmp_path, {}, special_tokens_map={"eos_token": "<im>"})
    ours = Tokenizer.from_pretrained(folder)
    assert ours.special_tokens == AutoTokenizer.from_pretrained(folder).special_tokens_map == {"eos_token": "<im>"}
    assert ours.encode("<eos>a<im>") == [31, 1, 32]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_special_flags_of_the_tokenizer_config_win_when_decoding(special, before, tmp_path):
    added = [tokenizers.AddedToken("<im>", special=before)]
    config = {"added_tokens_decoder": {"32": {**TOKEN, "special": special}}}
    ours = assert_as_transformers(write_words(tmp_path, config, added))
    if not before:
        assert ours.decode([0, 32]) == (" " if special else " <im>")


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_special_flags_of_a_qwen2_folder_are_those_of_the_tokenizer_config(special, before, tmp_path):
    """Qwen2Tokenizer of transformers forgets the flags of tokenizer.json. The library alone keeps a token special."""
    added = [tokenizers.AddedToken("<im>", special=before)]
    config = {"added_tokens_decoder": {"32": {**TOKEN, "rstrip": False, "special": special}}, "unk_token": None}
    folder = write_words(tmp_path, {**config, "pad_token": None}, added, config={"model_type": "qwen2"})
    ours, theirs = Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.decode([1, 32, 2]) == theirs.decode([1, 32, 2], skip_special_tokens=True)
    assert ours.decode([1, 32, 2]) == ("ab" if special else "a<im>b")


def test_a_named_token_is_special_when_decoding(tmp_path):
    added = [tokenizers.AddedToken("<im>", special=False)]
    ours = assert_as_transformers(write_words(tmp_path, {"bos_token": "<im>"}, added))
    assert ours.decode([0, 32, 1]) == " a"


@pytest.mark.parametrize("wanted", [True, False, None])
@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer", "qwen2 by config.json"])
def test_add_prefix_space_of_the_tokenizer_config_is_obeyed(kind, has, wanted, tmp_path):
    splitter = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=has)
    config = {"unk_token": None, "pad_token": None, "bos_token": "<im>"}
    config |= {} if wanted is None else {"add_prefix_space": wanted}
    if kind.startswith("qwen2"):
        files = {"config": {"model_type": "qwen2"}}
    else:
        files, config = {}, {**config, "tokenizer_class": kind}
    folder = write_words(tmp_path, config, [tokenizers.AddedToken("<im>", special=True)], splitter, **files)
    ours, theirs = Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if wanted in (None, has):  # tokenizer.json counts if no file contradicts it
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for text in ("ab", "ab cd", "<im>ab", " ab", "ab\ncd", "a_b"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
    assert ours.encode("ab") == ([0, 1, 2] if wanted or (wanted is None and has) else [1, 2])


def test_add_prefix_space_of_a_sentencepiece_tokenizer_is_obeyed(tmp_path):
    vocabulary = {letter: i for i, letter in enumerate(["<unk>", "<s>", "</s>", "\u2581", *LETTERS.strip()])}
    for wanted, scheme, legacy in itertools.product((True, False), ("always", "never"), (True, False)):
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme, split=False)
        backend.add_special_tokens(["<unk>", "<s>", "</s>"])
        backend.save(str(tmp_path / "tokenizer.json"))
        config = {"tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": wanted, "legacy": legacy,
                  "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}  # fmt: skip
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        if wanted == (scheme == "always"):
            continue  # nothing to change
        ours, theirs = Tokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        for text in ("ab", "ab cd", "<s>ab</s>cd", " ab"):
            ids = theirs.encode(text, add_special_tokens=False)
            assert ours.encode(text) == ids, (text, config)
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_a_contradiction_about_the_prefix_space_is_refused(tmp_path):
    """transformers 4 and 5 resolve it in different ways, if the class is not one of those that decide it."""
    with pytest.raises(ValueError, match=r"tokenizer_config\.json has add_prefix_space true.*make the two equal"):
        Tokenizer.from_pretrained(write_words(tmp_path, {"add_prefix_space": True}))


@pytest.mark.parametrize(
    ("config", "files", "words"),
    [
        ({"added_tokens_decoder": {"7": {"content": "<im>"}}}, {}, r"added_tokens_decoder .*'<im>' .* 7.* id 32"),
        ({"added_tokens_decoder": {"99": {"content": "<new>"}}}, {}, r"'<new>' .* 99, .* id 34"),
        ({"added_tokens_decoder": {"x": {"content": "<new>"}}}, {}, r"'x'.* expected an id"),
        ({"added_tokens_decoder": {"34": "<new>"}}, {}, r"expected an id and a token's object"),
        ({"added_tokens_decoder": {"34": {"content": 5}}}, {}, r"expected text"),
        ({"added_tokens_decoder": {"34": {"content": "<n>", "special": "no"}}}, {}, r"expected flags"),
        ({"added_tokens_decoder": []}, {}, r"added_tokens_decoder in .*expected an object"),
        ({"extra_special_tokens": "<im>"}, {}, r"extra_special_tokens in .*expected a list"),
        ({"extra_special_tokens": [5]}, {}, r"extra_special_tokens in .*found 5"),
        ({}, {"added_tokens": {"<im>": 7}}, r"added_tokens\.json.* 7, .* id 32"),
        ({}, {"added_tokens": {"<im>": "7"}}, r"added_tokens\.json: found '7'"),
        ({}, {"special_tokens_map": {"bos_token": 7}}, r"bos_token in .*special_tokens_map\.json: found 7"),
        ({}, {"special_tokens_map": [7]}, r"special_tokens_map\.json holds \[7\]"),
    ],
)
def test_declarations_that_contradict_the_vocabulary_are_refused(config, files, words, tmp_path):
    """CHECKLIST 46: found, expected, and the file."""
    with pytest.raises(ValueError, match=words) as caught:
        Tokenizer.from_pretrained(write_words(tmp_path, config, **files))
    assert len(str(caught.value).splitlines()) == 1


def test_an_id_of_tokenizer_json_that_the_library_changes_is_refused(tmp_path):
    """The library gives an added token the next free id, whatever the file says, and only warns."""
    folder = write_words(tmp_path, {}, [tokenizers.AddedToken("<new>", special=True)])
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][0]["id"] = 77
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"added_tokens in .*'<new>' is declared as token 77, .* id 34"):
        Tokenizer.from_pretrained(folder)


def test_a_token_that_the_normalizer_changes_is_refused(tmp_path):
    """Lower-casing comes before the search for tokens, and this token has capitals."""
    folder = write_words(tmp_path, {}, [tokenizers.AddedToken("<IM>", special=True, normalized=False)])
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    content["added_tokens"][0]["normalized"] = True
    content["added_tokens"].append({**content["added_tokens"][0], "id": 35, "content": "<im>"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"<im>|<IM>"):
        Tokenizer.from_pretrained(folder)


def test_a_pad_id_of_minus_one_stands_for_none(tmp_path):
    """Old llama releases write it. transformers loads them."""
    folder = write_checkpoint(tmp_path, pad_token=None, config={"pad_token_id": -1})
    assert Tokenizer.from_pretrained(folder).pad_token_id == id_of(folder, "<|im_end|>")


def test_an_older_format_is_named(tmp_path):
    folder = write_checkpoint(tmp_path)
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model only, an older format"):
        Tokenizer.from_pretrained(folder)


# ---- where the template stands


@pytest.mark.parametrize("form", ["string", "list", "file"])
def test_three_forms_of_template_equal_transformers(tmp_path, form):
    other = "other {{ messages }}"
    named = [{"name": "tool_use", "template": other}, {"name": "default", "template": CHATML}]
    folder = write_checkpoint(tmp_path, {"string": CHATML, "list": named, "file": other}[form])
    if form == "file":  # goes before the entry in tokenizer_config.json
        (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    ours, theirs = Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for ask in (True, False):
        text = ours.render_chat(MESSAGES, add_generation_prompt=ask)
        assert text == theirs.apply_chat_template(MESSAGES, add_generation_prompt=ask, tokenize=False)
        assert text.endswith("<|im_start|>assistant\n") == ask
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=False, return_dict=False)
    assert ours.encode(text) == ids


TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"x": 1}}}


@pytest.mark.parametrize("form", ["list", "files", "files without a default"])
def test_tools_take_the_template_named_tool_use(form, tmp_path):
    source = "{{ tools[0].function.name }} {{ messages|length }}"
    named = [{"name": "tool_use", "template": source}, {"name": "default", "template": CHATML}]
    folder = write_checkpoint(tmp_path / "a", named if form == "list" else "of tokenizer_config.json")
    if form != "list":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(source)
        (folder / "additional_chat_templates" / "rag.jinja").write_text("{% broken")  # matters only if it is used
    if form == "files":
        (folder / "chat_template.jinja").write_text(CHATML)
    ours = Tokenizer.from_pretrained(folder)
    for _ in range(2):
        theirs = AutoTokenizer.from_pretrained(folder)
        for tools in (None, [], [TOOL]):
            try:
                expected = theirs.apply_chat_template(MESSAGES, tools=tools, tokenize=False)
            except Exception:  # no default; or no tool in the list
                with pytest.raises(ValueError, match="chat template"):
                    ours.render_chat(MESSAGES, add_generation_prompt=False, tools=tools)
                continue
            assert ours.render_chat(MESSAGES, add_generation_prompt=False, tools=tools) == expected
        ours.save_pretrained(tmp_path / "b")  # the other templates are saved, too
        folder, ours = tmp_path / "b", Tokenizer.from_pretrained(tmp_path / "b")


def test_values_of_none_and_reasoning_reach_the_template_as_in_transformers(tmp_path):
    source = "{% for m in messages %}{{ m.keys()|list }}{{ m.content }}{{ m.tool_calls is defined }}"
    source += "{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}"
    folder = write_checkpoint(tmp_path, source)
    ours, theirs = Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for message in (
        {"role": "assistant", "content": None, "tool_calls": None},
        {"role": "assistant", "content": "a", "tool_calls": [{"x": None}], "reasoning_content": None},
        {"role": "assistant", "content": "a", "thinking": "t"},
        {"role": "assistant", "content": "a", "reasoning": "r", "thinking": None},
        {"role": "assistant", "content": "a", "reasoning_content": "r", "thinking": "t"},
    ):
        expected = theirs.apply_chat_template([message], tokenize=False)
        assert ours.render_chat([message], add_generation_prompt=False) == expected
    with pytest.raises(ValueError, match="empty conversation"):
        ours.render_chat([])


def test_template_variables_and_special_tokens_reach_the_template(tmp_path):
    source = "{{ eos_token }}|{{ pad_token }}|{{ bos_token is defined }}|{{ tools is none }}|{{ enable_thinking }}"
    folder = write_checkpoint(tmp_path, source)
    text = Tokenizer.from_pretrained(folder).render_chat(MESSAGES, enable_thinking=False)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert text == theirs.apply_chat_template(MESSAGES, tokenize=False, enable_thinking=False)
    assert text == "<|im_end|>|<|endoftext|>|False|True|False"


# ---- saving


def test_saved_folder_is_complete_and_opens_in_transformers(tmp_path):
    """CHECKLIST 9: the stop ids survive the way through a saved folder, too."""
    folder = write_checkpoint(tmp_path / "a", generation={"eos_token_id": [3, 5]})
    (folder / "chat_template.jinja").write_text(CHATML + "!", encoding="utf-8")
    first = Tokenizer.from_pretrained(folder)
    first.save_pretrained(tmp_path / "runs" / "b")
    again, theirs = (
        Tokenizer.from_pretrained(tmp_path / "runs" / "b"),
        AutoTokenizer.from_pretrained(tmp_path / "runs" / "b"),
    )
    assert again.eos_token_ids == first.eos_token_ids
    assert theirs.encode(TEXTS[4]) == first.encode(TEXTS[4]) == again.encode(TEXTS[4])
    assert theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == again.render_chat(
        MESSAGES
    )


def test_saving_leaves_out_the_source_s_python_files(tmp_path):
    """transformers would look for own_tokenizer.py, which is not in the saved folder."""
    folder = write_checkpoint(tmp_path / "a", auto_map={"AutoTokenizer": ["own_tokenizer.OwnTokenizer", None]})
    Tokenizer.from_pretrained(folder).save_pretrained(tmp_path / "b")
    before, after = (json.loads((tmp_path / name / "tokenizer_config.json").read_text()) for name in "ab")
    assert before.pop("auto_map")
    assert after == before
    ids = AutoTokenizer.from_pretrained(tmp_path / "b").encode(TEXTS[4], add_special_tokens=False)
    assert ids == Tokenizer.from_pretrained(tmp_path / "b").encode(TEXTS[4])


# ---- streaming


def test_incremental_decoder_gives_whole_characters(tmp_path):
    tokenizer = Tokenizer.from_pretrained(write_checkpoint(tmp_path))
    ids = tokenizer.encode("é日本🙂 the numbers<|im_end|>\n")
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(token_id) for token_id in ids]
    assert pieces[:2] == ["", "é"]  # two bytes, two tokens
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) == tokenizer.decode(ids) == "é日本🙂 the numbers\n"
    assert decoder.flush() == ""


def test_incremental_decoder_gives_broken_bytes_before_the_next_character_and_at_the_end(tmp_path):
    tokenizer = Tokenizer.from_pretrained(write_checkpoint(tmp_path))
    lead, letter = tokenizer.encode("🙂")[0], tokenizer.encode("a")[0]
    decoder = IncrementalDecoder(tokenizer)
    assert decoder.push(lead) == ""
    assert decoder.flush() == "\ufffd"
    assert [decoder.push(token) for token in (lead, lead, letter)] == ["", "", "\ufffd\ufffda"]
    assert [decoder.push(lead) for _ in range(40)] == [""] * 40
    assert decoder.flush() == "\ufffd" * 40


def streaming_backend(kind):
    """A tokenizer without merges or words, so that nearly every character has several tokens."""
    if kind == "byte-level":
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
    elif kind == "wordpiece":
        words = {"[UNK]": 0, "hel": 1, "##lo": 2, "a": 3, ",": 4, "##a": 5}
        backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        backend.decoder = tokenizers.decoders.WordPiece()
    else:
        words = {**{f"<0x{i:02X}>": i for i in range(256)}, "\u2581": 256, "a": 257, "\u2581a": 258}
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(words, [("\u2581", "a")], byte_fallback=True))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        pieces = [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback()]
        pieces += [tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)]
        backend.decoder = tokenizers.decoders.Sequence(pieces)
    backend.add_special_tokens(["<eos>"])
    return backend


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece", "wordpiece"])
def streaming(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    streaming_backend(request.param).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    return Tokenizer.from_pretrained(folder)


def streamed(tokenizer, ids, skip):
    decoder = IncrementalDecoder(tokenizer, skip)
    pieces = [decoder.push(token) for token in ids]
    return pieces, "".join(pieces) + decoder.flush()


characters = st.sampled_from([*"ab \n,", "  ", "é", "日", "🙂", "🧑\u200d🚀", "<eos>", "hello"]) | st.text(max_size=3)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.lists(characters, max_size=8).map("".join), skip=st.booleans())
def test_streamed_text_is_the_decoded_text(streaming, text, skip):
    ids = streaming.encode(text)
    pieces, whole = streamed(streaming, ids, skip)
    assert whole == streaming.decode(ids, skip)
    assert "\ufffd" in whole or all("\ufffd" not in piece for piece in pieces)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, 10_000), max_size=40), skip=st.booleans())
def test_any_ids_can_be_streamed(streaming, ids, skip):
    ids = [token % streaming.vocab_size for token in ids]
    whole, expected = streamed(streaming, ids, skip)[1], streaming.decode(ids, skip)
    assert whole == expected or "<0x41>" in streaming._backend.get_vocab()  # sentencepiece, see the class
    assert bool(whole) == bool(expected)


# ---- bad input: one line that names the file


@pytest.mark.parametrize(
    ("name", "content", "kind", "words"),
    [
        ("tokenizer.json", None, FileNotFoundError, r"no tokenizer: looked for .*tokenizer\.json"),
        ("tokenizer.json", '{"model": ', ValueError, r"tokenizer\.json is not readable JSON"),
        ("tokenizer.json", "{}", ValueError, r"tokenizer\.json is not a tokenizer"),
        ("tokenizer.json", "null", ValueError, r"tokenizer\.json holds None, expected a JSON object"),
        ("tokenizer_config.json", "[" * 99_999, ValueError, r"tokenizer_config\.json is not readable JSON"),
        ("tokenizer_config.json", "\x80", ValueError, r"tokenizer_config\.json is not readable JSON"),
        ("tokenizer_config.json", '{"eos_token": 3}', ValueError, r"eos_token in .*: found 3, expected text"),
        ("tokenizer_config.json", '{"eos_token": "<no>"}', ValueError, r"eos_token '<no>', which is no token"),
        ("tokenizer_config.json", "{}", ValueError, r"no stop token"),
        ("generation_config.json", '{"eos_token_id": [1, "2"]}', ValueError, r"found '2', expected ids from 0 to \d+"),
        ("generation_config.json", '{"eos_token_id": 151645}', ValueError, r"found 151645, expected ids from 0 to \d+"),
        ("config.json", '{"eos_token_id": true}', ValueError, r"found True, expected ids"),
    ],
)
def test_bad_files_end_in_one_line(tmp_path, name, content, kind, words):
    """CHECKLIST 46: found, expected, what to do."""
    folder = write_checkpoint(tmp_path)
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(kind, match=words) as caught:
        Tokenizer.from_pretrained(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_without_template_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"no chat template: .*neither chat_template\.jinja nor"):
        Tokenizer.from_pretrained(write_checkpoint(tmp_path, None)).render_chat(MESSAGES)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        Tokenizer.from_pretrained(tmp_path / "missing")


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("fuzzed"))


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("x" * 300_000)
json_values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=8), v, max_size=4)
)
names = ["chat_template", "eos_token", "pad_token", "bos_token", "unk_token"]
entries = json_values | st.lists(st.fixed_dictionaries({"name": st.just("default"), "template": json_values}))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(names), entries) | json_values)
def test_any_tokenizer_config_works_or_ends_in_one_line(fuzzed, content):
    (fuzzed / "tokenizer_config.json").write_text(json.dumps(content))
    try:
        assert isinstance(Tokenizer.from_pretrained(fuzzed).render_chat(MESSAGES), str)
    except ValueError as error:
        lines = str(error).splitlines()
    else:
        lines = [""]
    assert len(lines) == 1
    assert len(lines[0]) < 1000


# ---- released checkpoints


@pytest.mark.weights
@pytest.mark.parametrize("name", ["Qwen2.5-Coder-0.5B-Instruct", "SmolLM2-135M-Instruct"])
def test_released_tokenizers_equal_transformers(name):
    """CHECKLIST 6, 9: the real files. Qwen's ids end before the embedding does, and it stops at two of them.

    The reference is the class that takes tokenizer.json as it stands: a folder converted from another format may name a
    `tokenizer_class` (Qwen2Tokenizer for SmolLM2) for which AutoTokenizer puts another splitter in the file's place.
    """
    folder = Path(os.environ.get("NANOGRPO_CHECKPOINTS", "models")) / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    ours, theirs = Tokenizer.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    tool = {"type": "function", "function": {"name": "f", "description": "é <b>", "parameters": {"x": 1}}}
    for tools in (None, [tool]):
        text = ours.render_chat(MESSAGES, tools=tools)
        assert text == theirs.apply_chat_template(MESSAGES, tools=tools, tokenize=False, add_generation_prompt=True)
    for each in (*TEXTS, text):
        assert ours.encode(each) == theirs.encode(each, add_special_tokens=False)
    if name.startswith("Qwen"):
        assert (ours.vocab_size, ours.eos_token_ids) == (151_665, (151_643, 151_645))
