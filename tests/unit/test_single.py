import torch
from torch import nn

from reconmtl.problems import planted
from reconmtl.single import SingleTasks, for_one


def test_each_task_gets_the_output_of_its_own_network() -> None:
    torch.manual_seed(0)
    networks = {t: planted.Blocks() for t in planted.TASKS}
    x = torch.randn(3, planted.LAYERS * planted.BLOCK)
    outputs = SingleTasks(networks)(x)
    assert list(outputs) == list(planted.TASKS)
    for task, network in networks.items():
        assert torch.equal(outputs[task], network(x)[task])


def test_the_problem_of_one_task_has_its_own_network_where_there_is_one() -> None:
    asked: list[str] = []

    def single(task: str) -> nn.Module:
        asked.append(task)
        return planted.Blocks()

    problem = planted.make()
    alone = for_one(problem.replace(single=single), "minus")
    assert alone.task_names == ("minus",)
    alone.model()
    assert asked == ["minus"]
    assert for_one(problem, "plus").model is problem.model
