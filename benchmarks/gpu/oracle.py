"""Float64 oracles in NumPy alone, so that every side of a comparison, whatever framework, is held against the same numbers.

Channels (heads) are independent but for the sums over channels in dB and dC. Where the cotangent is zero outside some channels,
those sums are over these channels, so that an oracle of a few channels tells every gradient of the whole call.
"""

import numpy as np

Arrays = dict[str, np.ndarray]
TOLERANCE = 1e-2
"""Of the norm of each output: a bfloat16 is rounded to 2^-9 of itself."""


def some(count: int, most: int = 8) -> np.ndarray:
    """Which channels are looked at: spread over all of them, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(int))


def errors(actual: Arrays, expected: Arrays) -> dict[str, float]:
    """||actual - expected|| / ||expected|| of every array that both have."""
    return {
        name: float(np.linalg.norm(actual[name] - array) / np.linalg.norm(array))
        for name, array in expected.items()
        if name in actual
    }


def verdict(found: dict[str, float]) -> str | None:
    """What is wrong; None if nothing is. NaN is wrong."""
    wrong = {name: error for name, error in found.items() if not error <= TOLERANCE}
    return f"wrong: relative error {wrong}" if wrong else None


def selective_scan(
    x: np.ndarray,
    dt: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray,
    dt_bias: np.ndarray,
    dy: np.ndarray,
) -> Arrays:
    """y of the scan with softplus and skip, and the gradients of sum(y dy): x, dt, dy [B, L, E], A [E, N], B, C [B, L, N].

    delta = softplus(dt + dt_bias),  h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t,  y_t = C_t h_t + D x_t.
    """
    batch, length, channels = x.shape
    raw = dt + dt_bias
    delta = np.logaddexp(raw, 0.0)
    u = delta * x
    h_LBEN = np.empty((length, batch, channels, A.shape[1]))
    g_LBEN = np.empty_like(h_LBEN)
    h = np.zeros(h_LBEN.shape[1:])
    for t in range(length):
        h = np.exp(delta[:, t, :, None] * A) * h + u[:, t, :, None] * B[:, t, None]
        h_LBEN[t] = h
    carried = np.zeros_like(h)
    for t in reversed(range(length)):
        g_LBEN[t] = carried + dy[:, t, :, None] * C[:, t, None]
        carried = np.exp(delta[:, t, :, None] * A) * g_LBEN[t]
    q_LBEN = g_LBEN * (h_LBEN - np.einsum("ble,bln->lben", u, B))
    d_u = np.einsum("lben,bln->ble", g_LBEN, B)
    d_raw = (x * d_u + np.einsum("lben,en->ble", q_LBEN, A)) / (1.0 + np.exp(-raw))
    return {
        "y": np.einsum("lben,bln->ble", h_LBEN, C) + D * x,
        "x": delta * d_u + D * dy,
        "dt": d_raw,
        "A": np.einsum("ble,lben->en", delta, q_LBEN),
        "B": np.einsum("lben,ble->bln", g_LBEN, u),
        "C": np.einsum("lben,ble->bln", h_LBEN, dy),
        "D": np.einsum("ble,ble->e", dy, x),
        "dt_bias": d_raw.sum((0, 1)),
    }


def scan_step(
    x: np.ndarray,
    dt: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray,
    dt_bias: np.ndarray,
    state: np.ndarray,
) -> Arrays:
    """One token: x, dt [B, E], A [E, N], B, C [B, N], state [B, E, N]; y and the new state."""
    delta = np.logaddexp(dt + dt_bias, 0.0)
    state = np.exp(delta[..., None] * A) * state + (delta * x)[..., None] * B[:, None]
    return {"y": np.einsum("ben,bn->be", state, C) + D * x, "state": state}


def retention(q: np.ndarray, k: np.ndarray, v: np.ndarray, log_decay: float, dy: np.ndarray, rows: int = 256) -> Arrays:
    """One lane and head, as attention over all tokens before, some rows at a time: y_i = sum_{j<=i} gamma^(i-j) (q_i k_j) v_j."""
    y, d_q, d_k, d_v = (np.zeros_like(a) for a in (v, q, k, v))
    for start in range(0, len(q), rows):
        end = min(start + rows, len(q))
        distance = np.arange(start, end)[:, None] - np.arange(end)
        decay = np.where(distance >= 0, np.exp(np.maximum(distance, 0) * log_decay), 0.0)
        scores, d_scores = decay * (q[start:end] @ k[:end].T), decay * (dy[start:end] @ v[:end].T)
        y[start:end] = scores @ v[:end]
        d_q[start:end] = d_scores @ k[:end]
        d_k[:end] += d_scores.T @ q[start:end]
        d_v[:end] += scores.T @ dy[start:end]
    return {"y": y, "q": d_q, "k": d_k, "v": d_v}
