"""Draw two-weights.svg: pruning one of two weights by magnitude and by the joint update. Run it in this folder."""

import numpy as np
from matplotlib.figure import Figure

F = np.array([[1.0, 0.8], [0.8, 1.0]])  # of the loss ½ (w - w0)ᵀ F (w - w0)
W0 = np.array([1.0, 1.25])

figure = Figure(figsize=(6.4, 4.2), layout="constrained")
axes = figure.subplots()
x, y = np.meshgrid(np.linspace(-0.9, 2.4, 300), np.linspace(-0.35, 2.5, 300))
dx, dy = x - W0[0], y - W0[1]
loss = 0.5 * (F[0, 0] * dx**2 + 2 * F[0, 1] * dx * dy + F[1, 1] * dy**2)
axes.contour(x, y, loss, levels=[0.02, 0.08, 0.18, 0.32, 0.5, 0.72], colors="#bbbbbb", linewidths=1)
axes.axhline(0, color="#888888", lw=1)
axes.axvline(0, color="#888888", lw=1)
axes.plot(*W0, "o", color="#333333")
axes.annotate("trained weights", W0, xytext=(8, 6), textcoords="offset points")
magnitude = np.array([0.0, W0[1]])
joint = np.array([0.0, W0[1] + F[0, 1] / F[1, 1] * W0[0]])
for end, colour, label, offset in (
    (magnitude, "#d95f02", "magnitude", (-72, -4)),
    (joint, "#1b9e77", "joint update", (10, 6)),
):
    cost = 0.5 * (end - W0) @ F @ (end - W0)
    axes.annotate("", end, W0, arrowprops={"arrowstyle": "->", "color": colour, "lw": 2})
    axes.annotate(
        f"{label}\nloss +{cost:.2f}", end, xytext=offset, textcoords="offset points", color=colour, fontweight="bold"
    )
axes.set_xlabel("$w_1$, which is pruned")
axes.set_ylabel("$w_2$, which stays")
axes.set_xlim(-0.9, 2.4)
axes.set_ylim(-0.35, 2.5)
axes.spines[["top", "right"]].set_visible(False)
figure.savefig("two-weights.svg")
