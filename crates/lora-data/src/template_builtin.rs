//! Chat templates by name, for tokenizers without one of their own or with one that does not fit the data.
//!
//! Each writes what an assistant says and the end token inside a generation block, so what is trained is exactly that.
//! Contents are written as they are, without trimming. A role that a layout does not have is an error.

/// A template whose turns are each written on their own: what begins the text, and what stands before and after the
/// words of system, user and assistant. What is trained begins with `space` and ends with the end token.
macro_rules! turns {
    ($start:literal, $system:literal, $system_end:literal, $user:literal, $user_end:literal, $assistant:literal, $space:literal, $end:literal, $after:literal) => {
        concat!(
            $start,
            "{% for message in messages %}",
            "{% if message['role'] == 'system' %}{{ '",
            $system,
            "' + message['content'] + ",
            $system_end,
            " }}{% elif message['role'] == 'user' %}{{ '",
            $user,
            "' + message['content'] + ",
            $user_end,
            " }}{% elif message['role'] == 'assistant' %}{{ '",
            $assistant,
            "' }}{% generation %}{{ '",
            $space,
            "' + message['content'] + ",
            $end,
            " }}{% endgeneration %}{{ '",
            $after,
            "' }}{% else %}{{ raise_exception('this template has no role ' + message['role']) }}{% endif %}{% endfor %}",
            "{% if add_generation_prompt %}{{ '",
            $assistant,
            "' }}{% endif %}"
        )
    };
}

/// A template that writes the system message into the first user turn.
macro_rules! system_in_user {
    ($start:literal, $system:literal, $system_end:literal, $user:literal, $user_end:literal, $assistant:literal, $space:literal, $end:literal, $after:literal) => {
        concat!(
            $start,
            "{% set ns = namespace(system='') %}{% for message in messages %}",
            "{% if message['role'] == 'system' and loop.first %}{% set ns.system = '",
            $system,
            "' + message['content'] + '",
            $system_end,
            "' %}{% elif message['role'] == 'user' %}{{ ",
            $user,
            " + ns.system + message['content'] + '",
            $user_end,
            "' }}{% set ns.system = '' %}{% elif message['role'] == 'assistant' %}{{ '",
            $assistant,
            "' }}{% generation %}{{ '",
            $space,
            "' + message['content'] + ",
            $end,
            " }}{% endgeneration %}{{ '",
            $after,
            "' }}{% else %}{{ raise_exception('this template has no role ' + message['role'] + ' here') }}{% endif %}{% endfor %}",
            "{% if add_generation_prompt %}{{ '",
            $assistant,
            "' }}{% endif %}"
        )
    };
}

/// Name and source.
const BUILT_IN: [(&str, &str); 9] = [
    (
        "alpaca",
        turns!(
            "{{ bos_token or '' }}",
            "",
            "'\\n\\n'",
            "### Instruction:\\n",
            "'\\n\\n'",
            "### Response:\\n",
            "",
            "eos_token",
            "\\n\\n"
        ),
    ),
    (
        "chatml",
        turns!(
            "",
            "<|im_start|>system\\n",
            "'<|im_end|>\\n'",
            "<|im_start|>user\\n",
            "'<|im_end|>\\n'",
            "<|im_start|>assistant\\n",
            "",
            "'<|im_end|>'",
            "\\n"
        ),
    ),
    (
        "gemma",
        system_in_user!(
            "{{ bos_token or '' }}",
            "",
            "\\n\\n",
            "'<start_of_turn>user\\n'",
            "<end_of_turn>\\n",
            "<start_of_turn>model\\n",
            "",
            "'<end_of_turn>'",
            "\\n"
        ),
    ),
    (
        "llama2",
        system_in_user!(
            "",
            "<<SYS>>\\n",
            "\\n<</SYS>>\\n\\n",
            "(bos_token or '') + '[INST] '",
            " [/INST]",
            "",
            " ",
            "' ' + eos_token",
            ""
        ),
    ),
    (
        "llama3",
        turns!(
            "{{ bos_token or '' }}",
            "<|start_header_id|>system<|end_header_id|>\\n\\n",
            "'<|eot_id|>'",
            "<|start_header_id|>user<|end_header_id|>\\n\\n",
            "'<|eot_id|>'",
            "<|start_header_id|>assistant<|end_header_id|>\\n\\n",
            "",
            "'<|eot_id|>'",
            ""
        ),
    ),
    (
        "mistral",
        system_in_user!("{{ bos_token or '' }}", "", "\\n\\n", "'[INST] '", " [/INST]", "", " ", "eos_token", ""),
    ),
    (
        "phi3",
        turns!(
            "",
            "<|system|>\\n",
            "'<|end|>\\n'",
            "<|user|>\\n",
            "'<|end|>\\n'",
            "<|assistant|>\\n",
            "",
            "'<|end|>'",
            "\\n"
        ),
    ),
    (
        "vicuna",
        turns!("{{ bos_token or '' }}", "", "'\\n\\n'", "USER: ", "'\\n'", "ASSISTANT:", " ", "eos_token", "\\n"),
    ),
    (
        "zephyr",
        turns!(
            "",
            "<|system|>\\n",
            "eos_token + '\\n'",
            "<|user|>\\n",
            "eos_token + '\\n'",
            "<|assistant|>\\n",
            "",
            "eos_token",
            "\\n"
        ),
    ),
];

/// The names of the built-in chat templates.
pub fn builtin_templates() -> impl Iterator<Item = &'static str> {
    BUILT_IN.iter().map(|(name, _)| *name)
}

/// The source of a built-in chat template.
pub(crate) fn builtin_source(name: &str) -> Option<&'static str> {
    BUILT_IN.iter().find(|(known, _)| *known == name).map(|(_, source)| *source)
}
