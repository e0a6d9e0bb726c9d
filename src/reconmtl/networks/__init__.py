"""Networks of the field, one file each; every one has `width=`."""
