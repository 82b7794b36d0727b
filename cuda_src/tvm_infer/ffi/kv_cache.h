// Packed functions of the kv cache: none yet.
#pragma once

#define TVM_INFER_KV_CACHE_FUNCTIONS(V)
