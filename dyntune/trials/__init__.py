"""Many short trainings: in this process or over several, recorded where they are to go on after a kill."""
