"""Optional: trainers of TRL and transformers."""
