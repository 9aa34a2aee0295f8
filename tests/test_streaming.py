"""The incremental decoder of tokenizer.py: its pieces, joined, are the decoded text, for every kind of tokenizer."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_fixtures import write_checkpoint

from tokenizer import IncrementalDecoder, Tokenizer


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
