"""What the scripts of this folder are made of. It sets and imports nothing: `lib.targets` must come before JAX."""
