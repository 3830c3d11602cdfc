"""Files that run without autocompress, each verified against the artifact."""
