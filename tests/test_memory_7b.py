"""The memory table of LLaMA-7B: what each accounting gives."""

import re

import memory_7b
import pytest

EIGHT, FOUR = ({"state_bits": 8, "basis_bits": bits} for bits in (8, 4))


def test_savings_against_adamw_in_bfloat16():
    eight, four = memory_7b.savings(1024, **EIGHT), memory_7b.savings(1024, **FOUR)
    assert eight["linear layers"] >= 0.88
    assert eight["linear layers, of all of AdamW"] >= 0.885
    assert four["everything"] >= 0.91
    # what the bytes are, by hand: codes, and one float32 scale to 256 or 128 of them
    sides = 32 * (4 * 2 * 4096 + 3 * (4096 + 11008)) * 1024
    moments = 2 * 7 * 32 * 1024**2
    dense = 2 * (2 * 32000 * 4096 + (2 * 32 + 1) * 4096)
    magnitudes = 2 * 32 * (5 * 4096 + 2 * 11008)
    codes = lambda n, block: n * (1 + 4 / block)
    common = codes(moments + dense + magnitudes, 256)
    assert eight["bytes"] == pytest.approx(common + codes(sides, 256), rel=1e-5)
    assert four["bytes"] == pytest.approx(common + sides * (1 / 2 + 4 / 128), rel=1e-5)


def test_rank_that_saves_what_the_paper_says():
    assert memory_7b.largest_rank(0.895, "linear layers", **EIGHT) == 912


def test_table(capsys, monkeypatch):
    monkeypatch.setattr(memory_7b, "largest_rank", lambda *_, **__: 8)
    memory_7b.main(["--rank", "512"])
    printed = capsys.readouterr().out
    assert "| 512 | 8-bit moments, 4-bit bases |" in printed
    assert re.search(r"galore +512 +8 +layer-wise .* yes", printed)
    assert re.search(r"adamw +- +- +whole .* no", printed)


def test_galore_and_adamw_are_what_the_paper_prints():
    """Within the papers' rounding, and their estimates of a state: bfloat16 scales, no float32 block scales."""
    cells = [line.split(" | ") for line in memory_7b.papers_table().splitlines()[2:]]
    for row in cells[:4]:
        assert float(row[2]) == pytest.approx(float(row[4].split()[0]), rel=0.08), row
