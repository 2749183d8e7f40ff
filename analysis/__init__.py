"""The study: commands, their stored measurements, the claims, and the figures."""
