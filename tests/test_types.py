"""A user's script under strict type checkers: exact types, and mistakes that it finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

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
reveal_type(tt.tied_conv2d(x, layer.packed_weight, kernel_size=3, residual=x, beta=-1))  # Tensor"
reveal_type(tt.prepare(layer.packed_weight, 8, 3))  # PreparedWeight"
reveal_type(tt.tied_exp(x, layer.packed_weight, kernel_size=3, terms=None))  # Tensor"
reveal_type(tt.exp_terms(torch.tensor(1.0), 1e-3))  # int"
reveal_type(tt.exp_error_bound(1.0, 5, "skew_adjoint"))  # float"
orthogonal = tt.SkewOrthogonalConv2d(8, 16, 3, stride=2, padding_mode="circular")
reveal_type(orthogonal.lipschitz_bound())  # float"
reveal_type(orthogonal.packed_weight)  # Parameter"
step = tt.AntisymmetricResidual2d(8, method="verlet", activation=torch.relu)
reveal_type(step.inverse(x))  # Tensor"
reveal_type(step.conv)  # TiedConv2d"
reveal_type(tt.tie(torch.nn.Sequential(layer.to_conv()), project=True))  # TieReport"
reveal_type(tt.untie(torch.nn.Sequential(layer)))  # Module"
reveal_type(tt.tied_linear(x, layer.packed_weight, symmetry="skew_adjoint"))  # Tensor"
reveal_type(tt.norm(layer.packed_weight, 8, 3))  # Tensor"
reveal_type(tt.scale_channels(layer.packed_weight, x, 8, 3))  # Tensor"
reveal_type(tt.spectral_norm(layer.packed_weight, 8, 3, method="circular", image_size=6))  # Tensor"
reveal_type(layer.power_iteration((6, 6))[1])  # Tensor"
reveal_type(layer.shift_diagonal_(alpha))  # TiedConv2d"
layer.weight = layer.weight.detach()
tt.TiedConv2d(8, 3, symmetry="skew")  # error
tt.TiedConv2d(8, 3, padding_mode="zero")  # error
tt.TiedConv2d(8, 3, padding="Same")  # error
tt.TiedConv2d(8, 8, 3)  # error
tt.tied_conv2d(x, layer.packed_weight, kernel_size=3, symmetry="even")  # error
tt.tied_conv2d(x, layer.packed_weight, kernel_size=3, beta=alpha)  # error
tt.pack(x, symmetry="skew")  # error
tt.unpack(x, 8, 3, symmetry="skew")  # error
tt.init.xavier_normal_(torch.nn.Conv2d(8, 8, 3))  # error
tt.spectral_norm(x, 8, 3, method="fft")  # error
layer.spectral_norm("power")  # error
layer.inner(layer.to_conv())  # error
tt.tied_exp(x, layer.packed_weight, kernel_size=3, symmetry="skew")  # error
tt.SkewOrthogonalConv2d(8, 8, 3, padding_mode="zero")  # error
tt.AntisymmetricResidual2d(8, method="leapfrog")  # error
layer.symmetry = "self_adjoint"  # error
layer.groups = 2  # error
"""


def run(command, folder, **environment):
    environment = {**os.environ, **environment}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.stdout


def said_by_mypy(script):
    """What the checker says to each line. In a folder's own terms, since a cache serves the next
    run with the paths of the last."""
    pytest.importorskip("mypy", reason="needs mypy")
    (script.parent / "none.ini").write_text("[mypy]\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", script.name]
    command += ["--cache-dir", str(ROOT / ".mypy_cache" / "user")]
    command += ["--follow-imports=silent", "--config-file=none.ini"]
    output = run(command, script.parent, MYPYPATH=str(ROOT))
    for line in output.splitlines():
        assert line.startswith(script.name), output
        number, kind, text = line.removeprefix(f"{script.name}:").split(":", 2)
        yield int(number), kind.strip() + text


def said_by_pyright(script):
    pytest.importorskip("pyright", reason="needs pyright")
    settings = {"typeCheckingMode": "strict", "extraPaths": [str(ROOT)]}
    (script.parent / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--project", str(script.parent), "--outputjson"]
    command += ["--pythonpath", sys.executable]
    for found in json.loads(run(command, script.parent))["generalDiagnostics"]:
        assert found["file"] == str(script), found
        yield found["range"]["start"]["line"] + 1, f"{found['severity']} {found['message']}"


@pytest.mark.parametrize("checker", [said_by_mypy, said_by_pyright])
def test_a_strict_checker_sees_exact_types_and_finds_the_mistakes(checker, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    said: dict[int, str] = {}
    for number, text in checker(script):
        said[number] = said.get(number, "") + text
    for number, line in enumerate(SCRIPT.splitlines(), 1):
        _, _, expected = line.partition("  # ")
        assert (expected in said[number]) if expected else number not in said, (line, said)
