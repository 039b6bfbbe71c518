"""The order of tokens made once for many sites, where that gathers less than each site by itself."""
