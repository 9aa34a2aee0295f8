"""Where a checkpoint's name leads, and that the bundled model loads."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from math_task import CountdownTask
from rollout.generation import generate
from rollout.sampling import SamplingParams
from run import pretrained
from run.pretrained import load_pretrained, locate_pretrained


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def no_network(repo, **options):
    raise LocalEntryNotFoundError("Cannot find the requested files in the disk cache.\nMore lines follow.")


def test_a_folder_is_taken_as_it_is(checkpoint_folder):
    assert locate_pretrained(str(checkpoint_folder)) == checkpoint_folder


def test_a_name_is_looked_up_among_the_bundled_and_under_models(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    for folder in ("assets/bundled", "models/fetched"):
        (tmp_path / folder).mkdir(parents=True)
        assert locate_pretrained(Path(folder).name).resolve() == tmp_path / folder


@pytest.mark.parametrize(("name", "repo"), [("Some-Model", "Qwen/Some-Model"), ("org/Some-Model", "org/Some-Model")])
def test_a_repo_without_an_owner_is_qwens(monkeypatch, tmp_path, name, repo):
    asked = []
    monkeypatch.setattr(
        pretrained, "snapshot_download", lambda repo, **options: asked.append((repo, options)) or tmp_path
    )
    assert locate_pretrained(name) == tmp_path
    assert asked[0][0] == repo


def test_neither_pickles_nor_code_are_fetched(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(pretrained, "snapshot_download", lambda repo, **options: asked.append(options) or tmp_path)
    locate_pretrained("org/Some-Model")
    fetched = [
        name
        for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "pytorch_model.bin",
                     "modeling_custom.py", "training_args.bin", "weights.pt", "optimizer.pth")
        if any(fnmatch.fnmatch(name, pattern) for pattern in asked[0]["allow_patterns"])
    ]  # fmt: skip
    assert fetched == ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"]


def test_without_network_and_copy_one_line_says_where_it_looked_and_how_to_get_it(monkeypatch):
    """CHECKLIST 46"""
    monkeypatch.setattr(pretrained, "snapshot_download", no_network)
    with pytest.raises(FileNotFoundError) as error:
        locate_pretrained("Qwen2.5-0.5B-Instruct")
    text = one_line(error)
    for part in ("assets/", "models/", "Qwen/Qwen2.5-0.5B-Instruct",
                 "hf download Qwen/Qwen2.5-0.5B-Instruct --local-dir models/Qwen2.5-0.5B-Instruct"):  # fmt: skip
        assert part in text


def test_a_path_that_is_not_there_is_not_asked_of_the_network(monkeypatch, tmp_path):
    """CHECKLIST 46"""
    monkeypatch.setattr(pretrained, "snapshot_download", lambda *_, **__: pytest.fail("asked the network"))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        locate_pretrained(str(tmp_path / "not" / "there"))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty working folder, no bundled or fetched models, and a test that fails if the network is asked."""
    monkeypatch.setattr(pretrained, "ROOT", tmp_path / "repository")
    monkeypatch.setattr(pretrained, "snapshot_download", lambda *_, **__: pytest.fail("asked the network"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_config(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nosuch", ["there is no such folder"]),
        ("../nosuch", ["there is no such folder"]),
        ("runs/mine", ["there is no such folder", "did you mean mine-2?"]),  # runs/ is here, so this is no repo id
        ("runs/mine-2/checkpoints/step-30", ["did you mean step-20?"]),
        ("runs/mine-2/nosuch/step-30", ["runs/mine-2 is the part that exists"]),
        ("runs/mine-2", ["is not a checkpoint, it holds 2", "--ckpt runs/mine-2/checkpoints/step-20"]),
        ("runs/mine-2/checkpoints", ["it holds 2", "--ckpt runs/mine-2/checkpoints/step-20"]),
        ("runs/mine-2/checkpoints/step-20/config.json", ["is a file", "--ckpt runs/mine-2/checkpoints/step-20"]),
        ("https://huggingface.co/Qwen/Qwen2.5-0.5B/tree/main", ["expected the repo id: --ckpt Qwen/Qwen2.5-0.5B"]),
        ("~nosuchuser/x", ["there is no user 'nosuchuser'"]),
        ("models/Qwen2.5-0.5B", ["there is no such folder", "to fetch it: --ckpt Qwen2.5-0.5B"]),
        ("outputs/mine", ["there is no such folder"]),  # no owner has this name
        ("a/b/c", ["there is no such folder"]),
        ("", ["expected a folder or a repo id"]),
        ("x\0y", ["expected a folder or a repo id"]),
        ("x" * 5000, ["File name too long"]),
    ],
)
def test_a_wrong_name_gets_the_hint_that_fits(name, words, offline):
    """CHECKLIST 70."""
    for step in (10, 20):
        folder = write_config(offline / "runs" / "mine-2" / "checkpoints" / f"step-{step}")
        os.utime(folder / "config.json", (step, step))
    with pytest.raises(FileNotFoundError) as error:
        locate_pretrained(name)
    text = one_line(error)
    assert all(word in text for word in words), text
    assert len(text) < 700


def test_a_misspelt_name_and_a_missing_owner_are_told(monkeypatch, offline):
    monkeypatch.setattr(pretrained, "snapshot_download", no_network)
    write_config(offline / "models" / "Qwen2.5-0.5B-Instruct")
    with pytest.raises(FileNotFoundError) as error:
        locate_pretrained("Qwen2.5-0.5B-Instuct")
    assert "did you mean Qwen2.5-0.5B-Instruct?" in one_line(error)
    assert "Qwen/ was put in front; write OWNER/Qwen2.5-0.5B-Instuct" in one_line(error)
    with pytest.raises(FileNotFoundError) as error:
        locate_pretrained("HuggingFaceTB/SmolLM2-135M")
    assert "was put in front" not in one_line(error)


def test_a_folder_of_an_owner_does_not_hide_the_owner_s_other_repos(monkeypatch, offline):
    asked = []
    monkeypatch.setattr(pretrained, "snapshot_download", lambda repo, **_: asked.append(repo) or offline)
    write_config(offline / "Qwen" / "Qwen2.5-0.5B")
    assert locate_pretrained("Qwen/Qwen2.5-0.5B") == Path("Qwen/Qwen2.5-0.5B")
    locate_pretrained("Qwen/Qwen2.5-7B")
    assert asked == ["Qwen/Qwen2.5-7B"]


def test_model_and_tokenizer_come_back_from_one_folder(checkpoint_folder, tiny_model, tokenizer):
    model, loaded = load_pretrained(checkpoint_folder, torch.float32)
    for name, parameter in tiny_model.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert loaded.encode("1 + 1 = 2") == tokenizer.encode("1 + 1 = 2")
    assert load_pretrained(checkpoint_folder, torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused(tmp_path, tokenizer):
    """CHECKLIST 46: otherwise the first such id ends the run with an index error, somewhere in the middle."""
    from conftest import make_config, make_model

    make_model(make_config(vocab_size=200)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"ids up to 258.*200 rows") as error:
        load_pretrained(tmp_path, torch.float32)
    one_line(error)


def test_the_bundled_model_loads_and_answers_in_its_format():
    model, tokenizer = load_pretrained(locate_pretrained("countdown-tiny"), torch.float32)
    task = CountdownTask(numbers=(3,), max_number=25, prompt_style="short")
    problems = task.test_problems(4)
    prompts = [tokenizer.render_chat(p.messages) + p.response_prefix for p in problems]
    completions = generate(model, prompts, SamplingParams(n=4, max_new_tokens=192), tokenizer=tokenizer, seed=0)
    formats = [task.reward(problems[c.prompt_index], c.text).parts["format"] for c in completions]
    assert sum(formats) / len(formats) > 0.5
    assert tokenizer.vocab_size <= model.config.vocab_size


def test_the_home_folder_of_an_unknown_user_is_one_line():
    with pytest.raises(FileNotFoundError, match="there is no user 'nosuchuser'") as error:
        locate_pretrained("~nosuchuser/model")
    assert "\n" not in str(error.value)
