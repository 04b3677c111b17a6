from pathlib import Path

import pytest

from megaslm.data import Document, TokenFile, ascii_tokenizer, build_token_file, builder, verify
from megaslm.errors import UserError


def documents(texts):
    return [Document(text, Path("x.jsonl"), line) for line, text in enumerate(texts, 1)]


@pytest.mark.parametrize("batch_characters", [1, 30, 1 << 21])
def test_documents_keep_their_order_and_end(bpe, tmp_path, monkeypatch, batch_characters):
    monkeypatch.setattr(builder, "BATCH_CHARACTERS", batch_characters)
    texts = [f"document {i} é" for i in range(50)]
    seen = []
    manifest = build_token_file(
        documents(texts),
        bpe,
        tmp_path / "x",
        options={"text_key": "text"},
        progress=lambda done: seen.append(done.tokens),
    )
    file = verify(tmp_path / "x")
    assert [bpe.decode(file.document(i)[:-1]) for i in range(50)] == texts
    assert all(file.document(i)[-1] == bpe.eod_id for i in range(50))
    assert manifest["documents"] == 50 and manifest["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert manifest["options"] == {"eod_id": 0, "text_key": "text"}
    assert seen == sorted(seen) and seen[-1] == manifest["tokens"] == file.num_tokens
    assert bpe.token_bytes[file.tokens].sum() == manifest["text_bytes"]


def test_without_end_of_document(bpe, tmp_path):
    build_token_file(documents(["a b"]), bpe, tmp_path / "x", append_eod=False)
    assert bpe.eod_id not in TokenFile(tmp_path / "x").tokens
    manifest = build_token_file(documents(["naïve"]), ascii_tokenizer(), tmp_path / "y")
    assert TokenFile(tmp_path / "y").num_tokens == 5 and manifest["mapped_characters"] == 1


def test_faults_leave_nothing_behind(tmp_path):
    with pytest.raises(UserError, match="no documents"):
        build_token_file([], ascii_tokenizer(), tmp_path / "x")
    with pytest.raises(UserError, match=r"x.jsonl:2: character '\\n'"):
        build_token_file(documents(["a", "\n"]), ascii_tokenizer("refuse"), tmp_path / "x")
    assert not list(tmp_path.iterdir())
