"""The diagonal state space of gated state spaces: a convolution with a sum of decaying modes, or their recurrence.

With lambda_n = -exp(Lambda_real_n) + i exp(Lambda_imag_n) (or i Lambda_imag_n) and c_hn = C_hn (exp(lambda_n) - 1) / lambda_n:

    X_t[h, n] = exp(lambda_n) X_{t-1}[h, n] + s_t[h]        y_t[h] = Re(sum_n c_hn X_t[h, n]) + D_h s_t[h]

Over a piece after the tokens up to p, with the kernel K_j[h] = Re(sum_n c_hn exp(lambda_n j)) and by FFT:

    y_t = sum over p < j <= t of K_{t-j} s_j + Re(sum_n c_n exp(lambda_n (t - p)) X_p[n]) + D s_t
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization

from ssm_jax.interop.torch.norms import at_least_float32
from ssm_jax.interop.torch.steps import Steps


class DSS(nn.Module):
    """LayerNorm, then the state space; float32 at least, whatever the type of the model.

    Args:
        channels, modes: H and N; every channel has the same modes.
        log_frequency: whether Lambda_imag is the logarithm of the frequency.
        accurate: modes and phases in float64.
        chunk_size: tokens in a piece.
    """

    def __init__(self, channels: int, modes: int, log_frequency: bool, accurate: bool, chunk_size: int) -> None:
        super().__init__()
        self.log_frequency, self.accurate, self.chunk_size = log_frequency, accurate, chunk_size
        self.norm = nn.LayerNorm(channels)
        self.Lambda_real = nn.Parameter(torch.empty(modes))
        self.Lambda_imag = nn.Parameter(torch.empty(modes))
        self.C_real = nn.Parameter(torch.empty(channels, modes))
        self.C_imag = nn.Parameter(torch.empty(channels, modes))
        self.param_D = nn.Parameter(torch.empty(channels))

    def init_weights(self) -> None:
        """Normal numbers everywhere, as the package."""
        for parameter in (self.Lambda_real, self.Lambda_imag, self.C_real, self.C_imag, self.param_D):
            initialization.normal_(parameter)

    def forward(self, v: Tensor, steps: Steps, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """y [B, L, H], and the complex state X [B, H, N] after the last token; ``state``: before the first, None at the start."""
        weight, bias = at_least_float32(self.norm.weight), at_least_float32(self.norm.bias)
        s = F.layer_norm(at_least_float32(v), weight.shape, weight, bias, self.norm.eps)
        if steps.present is not None:
            s = s * steps.present[..., None]
        modes, c = self._modes()
        outputs, start = [], 0
        for part in steps.split(self.chunk_size):
            columns = slice(start, start := start + part.number.shape[1])
            outputs.append(self._piece(part, s[:, columns], modes, c, state))
            state = self._after(part, s[:, columns], modes, state)
        assert state is not None
        return torch.cat(outputs, dim=1) + at_least_float32(self.param_D) * s, state

    def _modes(self) -> tuple[Tensor, Tensor]:
        """lambda [N] and c [H, N], complex."""
        real, imag, C_real, C_imag = (
            parameter.double() if self.accurate else at_least_float32(parameter)
            for parameter in (self.Lambda_real, self.Lambda_imag, self.C_real, self.C_imag)
        )
        modes = torch.complex(-real.exp(), imag.exp() if self.log_frequency else imag)
        return modes, torch.complex(C_real, C_imag) * (modes.exp() - 1) / modes

    def _powers(self, modes: Tensor, exponents: Tensor, like: Tensor) -> Tensor:
        """exp(lambda_n e) [..., N] for exponents e [...], in the precision of ``like``."""
        powers = torch.exp(modes * exponents[..., None].to(modes.real.dtype))
        return powers.to(torch.complex128 if like.dtype == torch.float64 else torch.complex64)

    def _piece(self, steps: Steps, s: Tensor, modes: Tensor, c: Tensor, state: Tensor | None) -> Tensor:
        length = s.shape[1]
        powers = self._powers(modes, torch.arange(length, device=s.device), s)
        c = c.to(powers.dtype)
        kernel = (powers @ c.mT).real
        if length == 1:
            y = kernel * s
        else:
            points = 2 * length  # so that nothing wraps around
            spectrum = torch.fft.rfft(kernel, points, dim=0) * torch.fft.rfft(s, points, dim=1)
            y = torch.fft.irfft(spectrum, points, dim=1)[:, :length]
        if state is None:
            return y
        powers = self._powers(modes, steps.read, s)
        return y + torch.einsum("btn,bhn->bth", powers.expand(len(s), -1, -1), c * state).real

    def _after(self, steps: Steps, s: Tensor, modes: Tensor, state: Tensor | None) -> Tensor:
        powers = self._powers(modes, steps.number[:, -1:] - steps.number, s)
        added = torch.einsum("btn,bth->bhn", powers.expand(len(s), -1, -1), s.to(powers.dtype))
        if state is None:
            return added
        return self._powers(modes, steps.read[:, -1], s)[:, None] * state + added
