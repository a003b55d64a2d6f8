"""Real libraries, plugged into the oracle: every value comes from the library's own forward, merge or autograd."""
