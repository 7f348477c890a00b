#pragma once

// Our tensor types, one row for each. Whatever has to name them all derives from here: the enums of ggml and llama.cpp, the traits of ggml and of
// its CPU and CUDA backends, file types, llama-quantize, tests. Macros only: ggml.h includes this. tesseraq_gguf has the same table for Python, and a
// test holds the two together.
//
//     X(TYPE, type, LAYOUT, layout, id, weights, bytes, ACTS, acts, rows, OTHER, bpw, help, error, dot_error)
//
//     TYPE, type      the name in ggml: GGML_TYPE_TYPE, and that of the file type. A type with the bytes of another one has its
//     LAYOUT, layout  functions: quantize_row_layout_ref, dequantize_row_layout, quantize_layout, ggml_vec_dot_layout_rows, and on CUDA
//                     dequantize_layout, vec_dot_layout_q8_1 and, but for PTQ types, ggml_cuda_mmq_load_tiles_layout
//     id              ggml_type, and llama_ftype
//     weights, bytes  of a block
//     ACTS, acts      type of the activations that meet it row by row in the CPU backend, one of the list below
//     rows            the type that has their layout
//     OTHER           what a tensor becomes whose rows are no multiple of the block
//     bpw             what a file says of its type
//     help            what llama-quantize says of it
//     error           largest errors that upstream's test-quantize-fns allows: of weights,
//     dot_error       and of a dot product

// affine: w = d*(q - z)
#define TESSERAQ_TSQ_TYPES(X) \
    X(TSQ2,    tsq2,    TSQ2,    tsq2,    500,  64, 18, Q8_TSQ, q8_tsq, q8_tsq, Q4_0, "2.25 bpw", "2.25 bpw affine (group 64)", 0.0075f, 0.06f) \
    X(TSQ3,    tsq3,    TSQ3,    tsq3,    501,  64, 26, Q8_TSQ, q8_tsq, q8_tsq, Q4_0, "3.25 bpw", "3.25 bpw affine (group 64)", 0.0040f, 0.04f) \
    X(TSQ4,    tsq4,    TSQ4,    tsq4,    502,  64, 34, Q8_TSQ, q8_tsq, q8_tsq, Q5_0, "4.25 bpw", "4.25 bpw affine (group 64)", 0.0020f, 0.02f)

// codewords: w = d*c, with c out of codebooks that are the universal ones or a model's. Their magnitudes are 31 at most: four products of
// codewords + 32 with activations have to fit into 16 bits.
#define TESSERAQ_BCQ_TYPES(X) \
    X(BCQ2,    bcq2,    BCQ2,    bcq2,    506,  64, 18, Q8_TSQ, q8_tsq, q8_tsq, Q4_0, "2.25 bpw", "2.25 bpw codebooks (group 64)", 0.0075f, 0.08f) \
    X(BCQ4,    bcq4,    BCQ4,    bcq4,    503,  64, 36, Q8_TSQ, q8_tsq, q8_tsq, Q5_0, "4.5 bpw", "4.5 bpw codebooks (group 64)", 0.0020f, 0.02f) \
    X(BCQ4_A4, bcq4_a4, BCQ4,    bcq4,    504,  64, 36, A4_BCQ, a4_bcq, q8_tsq, Q5_0, "4.5 bpw, activations too", "4.5 bpw codebooks, for activations of 4 bits", 0.0020f, 0.03f)

// signs, and a few salient columns, which an order of the columns brings to the front of every block
#define TESSERAQ_PTQ_TYPES(X) \
    X(PTQ1_61, ptq1_61, PTQ1_61, ptq1_61, 505, 128, 27, Q8_PTQ, q8_ptq, q8_ptq, Q4_0, "1.6875 bpw", "1.6875 bpw, most of them signs (group 128)", 0.025f, 0.40f)

#define TESSERAQ_TYPES(X) TESSERAQ_TSQ_TYPES(X) TESSERAQ_BCQ_TYPES(X) TESSERAQ_PTQ_TYPES(X)

// Activations row by row in the CPU backend, which no file holds: X(TYPE, type, id, numbers, bytes)
#define TESSERAQ_ACTIVATIONS(X) \
    X(Q8_TSQ, q8_tsq, 510,  64,  72) \
    X(A4_BCQ, a4_bcq, 511,  64,  72) \
    X(Q8_PTQ, q8_ptq, 512, 128, 144)

// Codebooks of a layout: X(LAYOUT, layout, count, levels, key). A file's own ones are an array of count*levels int8 in its metadata.
#define TESSERAQ_CODEBOOKS(X) \
    X(BCQ2, bcq2, 4,  4, "tesseraq.bcq2.codebooks") \
    X(BCQ4, bcq4, 8, 16, "tesseraq.bcq.codebooks")

// what GGML_TYPE_COUNT becomes: one more than the largest id
#define TESSERAQ_TYPE_END 513

// ---- what lists are made of -----------------------------------------------------------------------------------------------------

// members of upstream's enums
#define TESSERAQ_GGML_TYPE(TYPE, type, LAYOUT, layout, id, ...)   GGML_TYPE_##TYPE = id,
#define TESSERAQ_GGML_FTYPE(TYPE, type, LAYOUT, layout, id, ...)  GGML_FTYPE_MOSTLY_##TYPE = id,  // except 1d tensors
#define TESSERAQ_LLAMA_FTYPE(TYPE, type, LAYOUT, layout, id, ...) LLAMA_FTYPE_MOSTLY_##TYPE = id, // except 1d tensors
#define TESSERAQ_GGML_ACTIVATIONS(TYPE, type, id, ...)            GGML_TYPE_##TYPE = id,

// labels of a switch, and elements of an array
#define TESSERAQ_CASE(TYPE, ...) case GGML_TYPE_##TYPE:
#define TESSERAQ_ITEM(TYPE, ...) GGML_TYPE_##TYPE,

// cases of a switch that turn file types into types, and the other way round
#define TESSERAQ_CASE_GGML_FTYPE(TYPE, ...)   case GGML_FTYPE_MOSTLY_##TYPE: wtype = GGML_TYPE_##TYPE; break;
#define TESSERAQ_CASE_LLAMA_FTYPE(TYPE, ...)  case LLAMA_FTYPE_MOSTLY_##TYPE: return GGML_TYPE_##TYPE;
#define TESSERAQ_CASE_TO_FTYPE(TYPE, ...)     case GGML_TYPE_##TYPE: ftype = LLAMA_FTYPE_MOSTLY_##TYPE; break;

// names of file types, options of llama-quantize
#define TESSERAQ_CASE_FTYPE_NAME(TYPE, type, LAYOUT, layout, id, weights, bytes, ACTS, acts, rows, OTHER, bpw, ...) \
    case LLAMA_FTYPE_MOSTLY_##TYPE: name = LLAMA_FTYPE_PREFIX #TYPE " - " bpw; break;
#define TESSERAQ_QUANT_OPTION(TYPE, type, LAYOUT, layout, id, weights, bytes, ACTS, acts, rows, OTHER, bpw, help, ...) \
    { #TYPE, LLAMA_FTYPE_MOSTLY_##TYPE, " " help, },

// what a tensor becomes whose rows are no multiple of the block
#define TESSERAQ_CASE_FALLBACK(TYPE, type, LAYOUT, layout, id, weights, bytes, ACTS, acts, rows, OTHER, ...) \
    case GGML_TYPE_##TYPE: return_type = GGML_TYPE_##OTHER; break;

// in a chain of `type == ... ? ... :`
#define TESSERAQ_IF_ERROR(TYPE, type_, LAYOUT, layout, id, weights, bytes, ACTS, acts, rows, OTHER, bpw, help, error, dot_error) \
    type == GGML_TYPE_##TYPE ? error :
#define TESSERAQ_IF_DOT_ERROR(TYPE, type_, LAYOUT, layout, id, weights, bytes, ACTS, acts, rows, OTHER, bpw, help, error, dot_error) \
    type == GGML_TYPE_##TYPE ? dot_error :
