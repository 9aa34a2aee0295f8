"""Two checkpoints and their page, for the tests of explain.py."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import explain
from run.pretrained import load_pretrained, locate_pretrained


@pytest.fixture(scope="module")
def tiny():
    return load_pretrained(locate_pretrained("countdown-tiny"), torch.float32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A second checkpoint: the bundled one, a little further on."""
    folder = tmp_path_factory.mktemp("after") / "after"
    shutil.copytree(locate_pretrained("countdown-tiny"), folder)
    model, _ = load_pretrained(folder, torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def page_file(tmp_path_factory, trained):
    path = tmp_path_factory.mktemp("page") / "page.html"
    assert explain.main(["--after", str(trained), "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def static_page(tmp_path_factory, trained):
    """The page of a checkpoint whose tokenizer qwen2.js does not read, before and after."""
    folder = tmp_path_factory.mktemp("static") / "other"
    shutil.copytree(locate_pretrained("countdown-tiny"), folder)
    description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(description | {"normalizer": None}), encoding="utf-8")
    path = folder.parent / "static.html"
    assert explain.main(["--ckpt", str(folder), "--after", str(trained), "--out", str(path)]) == 0
    return path
