"""Between the contract's messages and the core: translate, decide nothing."""
