"""One model in several processes, a part of its weights and of its KV rows in each."""
