"""tokenizer.py: ids, chat templates, stop ids, saving. The reference is transformers, on tiny tokenizers."""

import json
import os
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_fixtures import CHATML, MESSAGES, TEXTS, id_of, write_checkpoint
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_types import MiniBatch, Problem
from tokenizer import Tokenizer

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
