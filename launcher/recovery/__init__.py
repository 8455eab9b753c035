"""All ranks of a run together: started, watched, restarted, and gone on with."""
