"""Published settings, each named once (Lialin et al. 2023, arXiv:2307.05695, its code, and the authors' announcement)."""

RANK = 128
ALPHA = 32.0
"""The low-rank path is scaled by ALPHA / RANK = 1/4."""
KEEP = (0.0, 0.1)
"""Share of an adapter's optimizer state that survives a reset: none of it to a tenth; 0.01 in the paper."""
KEEP_MAGNITUDE = 0.1
KEEP_RANDOM = 0.001
"""What the code keeps where it "resets": it draws at random, because exact zeros broke its sharded optimizer."""
REWARMUP_STEPS = (10, 50)
"""Steps of the warm-up after each merge, in the announcement; ``REWARMUP_STEPS_PAPER`` in the paper."""
REWARMUP_STEPS_PAPER = (50, 100)
WARMUP_STEPS = 500
WARM_START_STEPS = (3_000, 5_000)
"""Steps of full-rank training that come first."""
FLOOR = 0.1
"""Last learning rate over the peak."""
TOOTH_FLOOR = 0.001
DROPOUT = 0.1
"""Of the adapters' input, in the published script; here it is off unless asked for."""
