"""A user's script under a strict type checker: exact types, and mistakes that it finds."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
import triton_tied as tt

layer = tt.TiedConv2d(8, 3, padding="same", symmetry="skew_adjoint", padding_mode="circular")
x = torch.randn(1, 8, 6, 6)
reveal_type(layer.to_conv())  # Conv2d"
reveal_type(tt.TiedConv1d(8, 3).to_conv())  # Conv1d"
reveal_type(tt.TiedConv3d(8, 3).to_conv())  # Conv3d"
reveal_type(tt.TiedConv2d.from_conv(layer.to_conv()))  # TiedConv2d"
reveal_type(layer.project_(layer.weight.detach()))  # TiedConv2d"
reveal_type(tt.init.kaiming_normal_(layer, mode="fan_out"))  # TiedConv2d"
reveal_type(layer.symmetry)  # 'self_adjoint'
reveal_type(layer.in_channels)  # int"
reveal_type(tt.unpack(tt.pack(layer.weight), 8, 3))  # Tensor"
alpha: float | torch.Tensor = torch.tensor(0.5)
reveal_type(tt.tied_conv2d(x, layer.packed_weight, kernel_size=3, alpha=alpha))  # Tensor"
reveal_type(tt.prepare(layer.packed_weight, 8, 3))  # PreparedWeight"
reveal_type(tt.tie(torch.nn.Sequential(layer.to_conv()), project=True))  # TieReport"
reveal_type(tt.untie(torch.nn.Sequential(layer)))  # Module"
layer.weight = layer.weight.detach()
tt.TiedConv2d(8, 3, symmetry="skew")  # error
tt.TiedConv2d(8, 3, padding_mode="zero")  # error
tt.TiedConv2d(8, 3, padding="Same")  # error
tt.TiedConv2d(8, 8, 3)  # error
tt.tied_conv2d(x, layer.packed_weight, kernel_size=3, symmetry="even")  # error
tt.pack(x, symmetry="skew")  # error
tt.unpack(x, 8, 3, symmetry="skew")  # error
tt.init.xavier_normal_(torch.nn.Conv2d(8, 8, 3))  # error
layer.symmetry = "self_adjoint"  # error
layer.groups = 2  # error
"""


def test_a_strict_checker_sees_exact_types_and_finds_the_mistakes(tmp_path):
    pytest.importorskip("mypy")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(script)]
    command += ["--cache-dir", str(Path(__file__).parents[1] / ".mypy_cache" / "script")]
    command += ["--follow-imports=silent", f"--config-file={tmp_path / 'none.ini'}"]
    (tmp_path / "none.ini").write_text("[mypy]\n")
    output = subprocess.run(command, capture_output=True, text=True).stdout
    said: dict[int, str] = {}
    for line in output.splitlines():
        assert line.startswith(str(script)), output
        number, kind, text = line.removeprefix(f"{script}:").split(":", 2)
        said[int(number)] = said.get(int(number), "") + kind.strip() + text
    for number, line in enumerate(SCRIPT.splitlines(), 1):
        _, _, expected = line.partition("  # ")
        assert (expected in said[number]) if expected else number not in said, (line, output)
