"""Files <-> layers: headers, loading, complete folders, dense export, older formats."""
