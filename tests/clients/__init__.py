"""vLLM, transformers with its plug-ins and llama.cpp load what outlierq writes. Run with `make test-clients`."""
