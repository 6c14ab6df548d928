// Nothing of it is used: see docs/adr/0002-stub-headers-of-gloo.md.
#pragma once
