// The functions of the extension. Addresses are of the device, sizes in elements; each returns once all is launched.
#pragma once

#include <cstdint>
#include <string>

namespace diffmoe {

using Pointer = std::uintptr_t;  // on the device; 0 for a tensor that is not there
using Stream = std::uintptr_t;   // a cudaStream_t

// device.cu: CUDA's reason why there is no usable device; empty where there is one.
std::string why_no_device();
// CUDA's reason why this build can't run on the current device: no code for it, or too old a driver; or empty.
std::string why_not_here();

// permute.cu
void permute_fwd(Pointer x, Pointer token_indices, Pointer group_offsets, Pointer out, int num_groups, int64_t num_rows,
                 int64_t columns, int type, Stream stream);
void unpermute_fwd(Pointer rows, Pointer gates, Pointer token_offsets, Pointer token_rows, Pointer out,
                   int64_t num_tokens, int64_t columns, int type, Stream stream);
void unpermute_bwd(Pointer rows, Pointer gates, Pointer token_indices, Pointer group_offsets, Pointer grad_out,
                   Pointer grad_rows, Pointer grad_gates, int num_groups, int64_t num_rows, int64_t columns, int type,
                   Stream stream);

// router_topk.cu; counts holds router_chunks(num_tokens) x num_experts numbers. At least one token.
int router_chunks(int64_t num_tokens);
void router_topk_fwd(Pointer logits, Pointer bias, Pointer scores, Pointer topk_ids, Pointer counts,
                     Pointer topk_weights, Pointer token_indices, Pointer gates, Pointer group_offsets,
                     Pointer token_offsets, Pointer token_rows, int64_t num_tokens, int num_experts, int top_k,
                     int type, bool softmax, int num_groups, int top_groups, float fill, bool normalize, float scale,
                     Stream stream);
void router_topk_bwd(Pointer grad_weights, Pointer grad_scores, Pointer grad_gates, Pointer scores, Pointer topk_ids,
                     Pointer token_rows, Pointer grad_logits, int64_t num_tokens, int num_experts, int top_k, int type,
                     bool softmax, bool normalize, float scale, Stream stream);

// token_drop.cu; where predicted there is one pool and a logit for each score, else logits, thresholds and wanted are
// 0. cuts and ties hold num_pools x num_experts numbers, wanted num_experts, counts num_pools x
// token_drop_chunks(pool_size) x num_experts. At least one token.
int token_drop_chunks(int64_t pool_size);
void token_drop_fwd(Pointer scores, Pointer logits, Pointer thresholds, Pointer cuts, Pointer ties, Pointer wanted,
                    Pointer counts, Pointer gates, Pointer token_indices, Pointer group_offsets, Pointer token_offsets,
                    Pointer token_rows, Pointer num_dropped, int num_pools, int64_t pool_size, int num_experts,
                    int capacity, int64_t num_rows, int scores_type, int logits_type, bool by_token, Stream stream);
void token_drop_bwd(Pointer grad_gates, Pointer group_offsets, Pointer token_offsets, Pointer token_rows,
                    Pointer grad_scores, int64_t num_tokens, int num_experts, int type, Stream stream);

// token_choice_drop.cu
void token_choice_drop_fwd(Pointer ids, Pointer scores, Pointer kept, Pointer num_dropped, int64_t num_slots,
                           int num_experts, int64_t capacity, bool wide_ids, int type, Stream stream);

}  // namespace diffmoe
