"""added_tokens.py, tokenizer_file.py: tokens and settings that only the small files of a folder declare.

Ids and texts are those of transformers for the same folder, or the folder is refused.
"""

import itertools
import json

import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tokenizer import Tokenizer

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
