"""``fastmem tasks``: the tasks with their prompts."""

from fastmem_pl.base.errors import unknown


def tasks(names: list[str]) -> None:
    """Show the tasks, or all prompts of those that are named.

    Args:
        names: name of a task.
    """
    from fastmem_pl.data import TASKS

    for name in names:
        if name not in TASKS:
            raise unknown("tasks", name, TASKS)
    for task in [TASKS[name] for name in names] or TASKS.values():
        print(f"{task.name}: {task.description}")
        print(f"  scores: {', '.join(task.scores)}")
        forms = {"prompt": task.prompt}
        if names:
            forms |= {"one-shot": task.one_shot, "without context (cad)": task.without_context}
            if task.context != "{context}":
                forms = {"memorized text, {context} of the prompts": task.context, **forms}
        for label, text in forms.items():
            print(f"  {label}:\n" + "\n".join(f"    {line}" for line in text.splitlines()))
        print()
    if not names:
        print("all prompts of one task: fastmem tasks NAME; a data file: --data.task NAME --data.path FILE")
