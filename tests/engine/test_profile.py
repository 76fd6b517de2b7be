"""Compute profiles: what ships, how they scale, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.core.config import ConfigError
from penstock.engine.profile import load_profile, profile_names

H100 = "h100-llama-3.1-8b"


def test_the_shipped_profile_is_the_papers_model_and_says_where_it_comes_from() -> None:
    assert H100 in profile_names()
    profile = load_profile(H100)
    assert profile.layers * profile.layer_bytes_per_token == 131072
    assert "not measured" in profile.source
    cost = profile.compute_cost()
    assert cost.seconds([(28, 28_100)]) == pytest.approx(0.019, rel=0.02)
    assert cost.seconds([(134, 15_500)]) == pytest.approx(0.025, rel=0.02)


def test_scaling_keeps_the_ratio_of_load_to_compute() -> None:
    profile = load_profile(H100)
    scaled = profile.scaled(64, 2.0)
    assert scaled.layers * scaled.layer_bytes_per_token == 131072 // 64
    span = [(100, 20_000)]
    assert scaled.compute_cost().seconds(span) == pytest.approx(2 * profile.compute_cost().seconds(span))
    load_s = 131072 / profile.upload_bytes_per_s
    assert 131072 / 64 / scaled.upload_bytes_per_s == pytest.approx(2 * load_s)
    assert (scaled.bytes_divisor, scaled.time_factor) == (64, 2.0)
    twice = scaled.scaled(2, 0.5)
    assert (twice.bytes_divisor, twice.time_factor) == (128, 1.0)
    assert twice.layers * twice.layer_bytes_per_token == 131072 // 128


def test_more_bytes_than_a_layer_has_are_divided_over_fewer_layers() -> None:
    scaled = load_profile(H100).scaled(8192, 1.0)
    assert scaled.layers * scaled.layer_bytes_per_token == 16


@pytest.mark.parametrize("divisor", [0, -1, 3, 131072 * 2])
def test_a_divisor_that_does_not_divide_is_refused(divisor: int) -> None:
    with pytest.raises(ConfigError, match=f"bytes_divisor is {divisor}; allowed: a divisor of 131072"):
        load_profile(H100).scaled(divisor, 1.0)


def test_a_profile_of_ones_own_and_what_is_wrong_with_others(tmp_path: Path) -> None:
    text = "\n".join(
        f"{name} = {value}"
        for name, value in {
            "name": '"mine"',
            "source": '"measured"',
            "layers": 2,
            "layer_bytes_per_token": 64,
            "dtype": '"bfloat16"',
            "vocab_size": 100,
            "max_context_tokens": 1000,
            "a_s": 0.001,
            "b_s": 1e-6,
            "c_s": 0.0,
            "upload_bytes_per_s": 1e9,
        }.items()
    )
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert load_profile(str(path)).name == "mine"
    path.write_text(text.replace("layers = 2", 'layers = "two"'))
    with pytest.raises(ConfigError, match="layers"):
        load_profile(str(path))
    path.write_text("layers = = 2")
    with pytest.raises(ConfigError, match=r"mine\.toml"):
        load_profile(str(path))
    path.write_text(text.replace("upload_bytes_per_s = 1000000000.0", "upload_bytes_per_s = 0.0"))
    with pytest.raises(ConfigError, match="upload_bytes_per_s is 0"):
        load_profile(str(path))
    path.write_text(text.replace("a_s = 0.001", "a_s = -1.0"))
    with pytest.raises(ConfigError, match="a_s is -1"):
        load_profile(str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"mine\.toml"):
        load_profile(str(path))
    with pytest.raises(ConfigError, match=f"profile is 'none'; allowed: .*{H100}"):
        load_profile("none")
    with pytest.raises(ConfigError, match="profile is"):
        load_profile(str(tmp_path / "missing.toml"))
