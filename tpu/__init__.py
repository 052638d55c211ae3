"""`tpu/pod`: pods for training, from asking for one to deleting it, by `gcloud`. Needs only Python and `gcloud`."""
