"""Rollouts: what one is asked to do, how a canary is judged, and its states. All of it pure."""
