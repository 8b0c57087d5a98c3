"""Callbacks for training libraries; each module imports its library, and uses mfac's public API only."""
