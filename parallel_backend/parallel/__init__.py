"""Model-agnostic parallelism: sharded linears, sharded sequences, and attention over shards. No model is named here."""
