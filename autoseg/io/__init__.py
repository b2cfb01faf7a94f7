"""Files in and out: the only place with nibabel, SimpleITK and safetensors."""
