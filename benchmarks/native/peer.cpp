// Decodes greedily with llama.cpp on one thread, and writes one byte a token: peer MODEL TOKENS

#include <llama.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>

int main(int count, char **arguments) {
    if (count != 3) return 2;
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    llama_model *model = llama_model_load_from_file(arguments[1], llama_model_default_params());
    if (!model) return 3;
    llama_context_params parameters = llama_context_default_params();
    parameters.n_ctx = 256;
    parameters.n_threads = parameters.n_threads_batch = 1;
    llama_context *context = llama_init_from_model(model, parameters);
    if (!context) return 4;
    const int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_token token = 1;
    for (int i = 0; i <= std::atoi(arguments[2]); ++i) {
        if (llama_decode(context, llama_batch_get_one(&token, 1))) return 5;
        const float *logits = llama_get_logits_ith(context, -1);
        token = static_cast<llama_token>(std::max_element(logits, logits + vocabulary) - logits);
        if (write(1, ".", 1) != 1) return 6;
    }
}
