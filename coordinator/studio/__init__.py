"""Workers that speak the studio contract, admitted as first-class ones."""
