// Generates tokens with a model that tvm_infer compiled and exported. No Python, no compiler, no tvm_infer beside model.so: this program
// links TVM's runtime (libtvm_ffi.so, libtvm_runtime.so; on a GPU also libtvm_runtime_cuda.so) and nothing else.
//
//   generate MODEL.so WEIGHTS.safetensors PROMPTS.txt [--max-new-tokens N] [--page-size N] [--kv-dtype NAME] [--stop TOKEN]
//     [--blas PATH [--blas-prefix P]]
//
// A line of PROMPTS.txt is one prompt, as token ids with spaces between; a line of the output is its continuation. All prompts run
// together: every step takes one token of each sequence that decodes, and of the others as much prompt as fits.
#include <tvm/ffi/error.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime.h"
#include "session.h"

namespace example {

struct Options {
  std::string model, weights, prompts, kv_dtype, blas, blas_prefix;
  int64_t max_new_tokens = 32, page_size = 16, stop = -1;
};

struct Sequence {
  std::vector<int64_t> pending;  // tokens that the model has not seen: the rest of the prompt, or the last one generated
  std::vector<int64_t> generated;
  bool is_done = false;
};

// The next step, and in `sampling` the sequence of each of its rows: those whose pending tokens it holds all of.
Batch NextBatch(std::vector<Sequence>& sequences, int64_t max_tokens, std::vector<size_t>& sampling) {
  Batch batch;
  sampling.clear();
  for (size_t i = 0; i < sequences.size(); ++i) {
    std::vector<int64_t>& pending = sequences[i].pending;
    const int64_t room = max_tokens - static_cast<int64_t>(batch.tokens.size());
    const int64_t take = std::min<int64_t>(static_cast<int64_t>(pending.size()), room);
    if (sequences[i].is_done || take == 0) continue;
    batch.ids.push_back(static_cast<int64_t>(i));
    batch.lengths.push_back(take);
    batch.tokens.insert(batch.tokens.end(), pending.begin(), pending.begin() + take);
    pending.erase(pending.begin(), pending.begin() + take);
    if (!pending.empty()) continue;
    batch.rows.push_back(static_cast<int64_t>(batch.tokens.size()) - 1);
    sampling.push_back(i);
  }
  return batch;
}

void Generate(const Options& options, std::vector<Sequence> sequences) {
  const Model model(options.model);
  if (!options.blas.empty()) model.Call("set_blas", options.blas, options.blas_prefix);
  const DeviceMemory memory(model.device());
  std::vector<int64_t> lengths;
  for (const Sequence& sequence : sequences) lengths.push_back(static_cast<int64_t>(sequence.pending.size()) + options.max_new_tokens);
  Session session(model, memory, options.weights, lengths, options.page_size, options.kv_dtype);
  for (const Sequence& sequence : sequences) {
    for (int64_t token : sequence.pending) {
      if (token >= 0 && token < session.Vocabulary()) continue;
      throw std::runtime_error(options.prompts + " has the token " + std::to_string(token) + "; the vocabulary is 0 to " +
                               std::to_string(session.Vocabulary() - 1));
    }
  }
  std::vector<size_t> sampling;
  while (true) {
    const Batch batch = NextBatch(sequences, session.max_tokens(), sampling);
    if (batch.ids.empty()) break;
    const std::vector<int64_t> tokens = session.Step(batch);
    for (size_t row = 0; row < sampling.size(); ++row) {
      Sequence& sequence = sequences[sampling[row]];
      sequence.generated.push_back(tokens[row]);
      sequence.is_done = tokens[row] == options.stop || static_cast<int64_t>(sequence.generated.size()) >= options.max_new_tokens;
      if (sequence.is_done) {
        session.Remove(static_cast<int64_t>(sampling[row]));
      } else {
        sequence.pending.push_back(tokens[row]);
      }
    }
  }
  for (const Sequence& sequence : sequences) {
    for (size_t i = 0; i < sequence.generated.size(); ++i)
      std::printf("%s%ld", i == 0 ? "" : " ", static_cast<long>(sequence.generated[i]));
    std::printf("\n");
  }
}

std::vector<Sequence> ReadPrompts(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot open " + path);
  std::vector<Sequence> sequences;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    Sequence sequence;
    for (int64_t token; words >> token;) sequence.pending.push_back(token);
    if (!words.eof()) throw std::runtime_error(path + ", line " + std::to_string(sequences.size() + 1) + ", is no list of token ids");
    if (sequence.pending.empty()) throw std::runtime_error(path + ", line " + std::to_string(sequences.size() + 1) + ", is empty");
    sequences.push_back(sequence);
  }
  if (sequences.empty()) throw std::runtime_error(path + " has no prompts");
  return sequences;
}

Options ParseOptions(int argc, char** argv) {
  const char* usage =
      "usage: generate MODEL.so WEIGHTS.safetensors PROMPTS.txt [--max-new-tokens N] [--page-size N] [--kv-dtype NAME] [--stop "
      "TOKEN] [--blas PATH [--blas-prefix P]]";
  Options options;
  std::vector<std::string> files;
  const std::map<std::string, int64_t*> numbers{
      {"--max-new-tokens", &options.max_new_tokens}, {"--page-size", &options.page_size}, {"--stop", &options.stop}};
  const std::map<std::string, std::string*> texts{
      {"--kv-dtype", &options.kv_dtype}, {"--blas", &options.blas}, {"--blas-prefix", &options.blas_prefix}};
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const bool has_value = i + 1 < argc;
    if (numbers.count(word) != 0 && has_value) {
      *numbers.at(word) = std::stoll(argv[++i]);
    } else if (texts.count(word) != 0 && has_value) {
      *texts.at(word) = argv[++i];
    } else if (word.rfind("--", 0) == 0) {
      throw std::runtime_error("unknown option, or no value for it: " + word + "\n" + usage);
    } else {
      files.push_back(word);
    }
  }
  if (files.size() != 3) throw std::runtime_error(usage);
  if (options.max_new_tokens < 1 || options.page_size < 1) throw std::runtime_error("--max-new-tokens and --page-size must be at least 1");
  options.model = files[0], options.weights = files[1], options.prompts = files[2];
  return options;
}

}  // namespace example

int main(int argc, char** argv) {
  try {
    const example::Options options = example::ParseOptions(argc, argv);
    example::Generate(options, example::ReadPrompts(options.prompts));
    return 0;
  } catch (const tvm::ffi::Error& error) {
    std::cerr << "generate: " << error.kind() << ": " << error.message() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "generate: " << error.what() << "\n";
  }
  return 1;
}
