"""OpenAI's routes: each module maps one family onto work parameters and results back onto OpenAI's JSON."""
