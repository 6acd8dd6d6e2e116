"""The paper's claims and the criteria that they are judged by, written down before anything is measured."""

from ntkbook.publish.verdicts import Claim


def _sinusoids(network: str, figure: str) -> tuple[Claim, ...]:
    prefix = "sinusoids" if network == "tanh" else f"sinusoids-{network.lower()}"
    rmse = f"RMSE of the NTK ({network}) on the noiseless curves of nine new tasks, minus that of"
    return (
        Claim(
            id=f"{prefix}-adapts",
            chapter="02_sinusoids",
            place=figure,
            sentence=f"Conditioning the trained {network} network's NTK on ten points adapts it to a new sinusoid.",
            quantity=f"{rmse} the network without adaptation",
            direction="<",
            threshold=0.0,
        ),
        Claim(
            id=f"{prefix}-features",
            chapter="02_sinusoids",
            place=figure,
            sentence=f"The features that a {network} network learns on one sinusoid are transferable to others.",
            quantity=f"{rmse} the untrained network's NTK",
            direction="<",
            threshold=0.0,
        ),
        Claim(
            id=f"{prefix}-coverage",
            chapter="02_sinusoids",
            place=figure,
            sentence=f"The {network} network's NTK gives reasonable posterior predictive distributions.",
            quantity="share of the noiseless curves inside the central 95 % predictive interval",
            direction="in",
            threshold=(0.9, 0.99),
        ),
    )


CLAIMS = (
    Claim(
        id="linearisation-duality",
        chapter="01_linearisation",
        place="Section 2.1",
        sentence="Function space and parameter space are two ways to the same posterior.",
        quantity="largest difference between the two spaces in mean, variance (relative to the prior's) and log "
        "marginal likelihood (relative to its own size)",
        direction="<",
        threshold=1e-8,
        paper_value="equal, by Woodbury's identity",
    ),
    Claim(
        id="linearisation-spectra",
        chapter="01_linearisation",
        place="Section 2.2",
        sentence="In regression the Fisher information matrix and the NTK have the same eigenvalues up to a factor.",
        quantity="largest difference between the eigenvalues of the two, relative to the largest eigenvalue",
        direction="<",
        threshold=1e-10,
        paper_value="equal",
    ),
    Claim(
        id="linearisation-general-losses",
        chapter="01_linearisation",
        place="Appendix C.1",
        sentence="For general losses both Gram matrices of the Jacobian follow from the Fisher matrix's eigenvectors "
        "and the root of H, by the two displayed equations.",
        quantity="largest relative error of the two equations as printed, with L a Cholesky root",
        direction="<",
        threshold=1e-8,
        paper_value="equal",
    ),
    Claim(
        id="linearisation-three-calls",
        chapter="01_linearisation",
        place="Appendix A",
        sentence="A product of a vector with the NTK takes three backward calls.",
        quantity="backward calls of one product by double backward, its error against the dense product below 1e-10",
        direction="in",
        threshold=(1.0, 3.0),
        paper_value="3",
    ),
    Claim(
        id="linearisation-convex",
        chapter="01_linearisation",
        place="Section 2.1.1",
        sentence="Linearising makes adaptation convex: the closed form is where every descent ends.",
        quantity="largest excess of the final loss over the closed form's, relative to it, over gradient descents of "
        "the linearised network from random starts",
        direction="<",
        threshold=1e-6,
    ),
    Claim(
        id="linearisation-width",
        chapter="01_linearisation",
        place="Section 2.1 and the talk's appendix",
        sentence="Wide networks evolve as linear models under gradient descent.",
        quantity="slope, in log-log, of the distance between a trained network and its trained linearisation against "
        "the width (theory's bound: -0.5)",
        direction="<",
        threshold=-0.25,
    ),
    Claim(
        id="linearisation-scaling",
        chapter="01_linearisation",
        place="Appendix A, Figure 4",
        sentence="The log marginal likelihood by Jacobian-vector products takes nearly linear time in the data.",
        quantity="slope, in log-log, of the time in function space against n, solved to a relative residual of 1e-6",
        direction="<",
        threshold=1.25,
        paper_value="nearly linear",
    ),
    Claim(
        id="linearisation-scaling-parameter",
        chapter="01_linearisation",
        place="Appendix A, Figure 4",
        sentence="The log marginal likelihood by Fisher-vector products takes nearly linear time in the data.",
        quantity="slope, in log-log, of the time in parameter space against n, solved to a relative residual of 1e-6",
        direction="<",
        threshold=1.25,
        paper_value="nearly linear",
    ),
    Claim(
        id="linearisation-cached",
        chapter="01_linearisation",
        place="the talk of February 2020",
        sentence="The difficult parts of a prediction can be cached.",
        quantity="time of the thousandth prediction, mean and variance, over that of the first with its conditioning",
        direction="<",
        threshold=0.1,
    ),
    *_sinusoids("tanh", "Section 3, Figure 1"),
    *_sinusoids("ReLU", "Appendix E, Figure 8"),
    Claim(
        id="sinusoids-parameter-space",
        chapter="02_sinusoids",
        place="Section 3; Appendix E, Figure 7",
        sentence="Parameter space gives similar predictive means.",
        quantity="largest difference of the means in function and in parameter space (tanh), nine new tasks, in "
        "predictive standard deviations",
        direction="<",
        threshold=1e-3,
        paper_value="similar",
    ),
    Claim(
        id="sinusoids-figure-nine",
        chapter="02_sinusoids",
        place="Appendices D and F, Figure 9",
        sentence="Finite-difference Fisher-vector products with ε = 1e-4 give the ReLU network's posterior.",
        quantity="largest distance of the posterior mean by forward differences in float32, ε = 1e-4, to that by exact "
        "products in float64, in predictive standard deviations",
        direction="<",
        threshold=0.1,
    ),
    Claim(
        id="sinusoids-fine-tuning",
        chapter="02_sinusoids",
        place="implied by Section 2.1.1 and the 2021 abstract",
        sentence="The closed form, free of fine-tuning's local optima, predicts better than fine-tuning the network.",
        quantity="RMSE of the NTK (tanh) on the noiseless curves of nine new tasks, minus that of full fine-tuning",
        direction="<",
        threshold=0.0,
    ),
    Claim(
        id="precipitation-source",
        chapter="03_precipitation",
        place="Appendix E, Figure 10",
        sentence="The NTK markedly improves the fit of the neural network on the source task.",
        quantity="standardised RMSE of the NTK on the source station's last 65 days, minus that of the network itself",
        direction="<",
        threshold=0.0,
    ),
    Claim(
        id="precipitation-adapts",
        chapter="03_precipitation",
        place="Section 3, Figures 2 and 11",
        sentence="One station's NTK, conditioned on another station's 300 days, adapts the network to that station.",
        quantity="standardised RMSE of the NTK at all other stations, minus that of the network without adaptation",
        direction="<",
        threshold=0.0,
    ),
    *(
        Claim(
            id=f"precipitation-{key}",
            chapter="03_precipitation",
            place=place,
            sentence=sentence,
            quantity=f"standardised RMSE of the NTK at all other stations, minus that of {what}",
            direction="<",
            threshold=0.0,
        )
        for key, place, sentence, what in (
            (
                "shared-rbf",
                "implied by Section 3, Figure 2, and Appendix E, Figure 11",
                "Sharing the NTK across related tasks is effective: better than sharing an RBF kernel.",
                "an RBF GP with the source station's hyperparameters",
            ),
            (
                "independent-rbf",
                "implied by Section 3, Figure 2",
                "A shared NTK predicts better than RBF GPs trained independently at each station.",
                "an RBF GP fitted to each station",
            ),
            (
                "ablr",
                "implied by Section 3, Figure 2",
                "The NTK predicts better than adaptive Bayesian linear regression on the last layer's features.",
                "ABLR",
            ),
            (
                "features",
                "Appendix B, footnote 6; Section 2.2",
                "What the network learned at one station makes its NTK a better prior at the others.",
                "the untrained network's NTK",
            ),
        )
    ),
    Claim(
        id="precipitation-coverage",
        chapter="03_precipitation",
        place="Section 3, Figure 2",
        sentence="The NTK provides the predictive variances that regression on real data needs.",
        quantity="share of the last 65 days of all other stations inside the central 95 % predictive interval",
        direction="in",
        threshold=(0.9, 0.99),
    ),
    Claim(
        id="precipitation-unrelated",
        chapter="03_precipitation",
        place="Appendix E, Figure 10",
        sentence="The NTK fails when the climate pattern is not related to the source station's.",
        quantity="standardised RMSE of the NTK at stations whose 300 days correlate negatively with the source's, "
        "minus that at the others",
        direction=">",
        threshold=0.0,
    ),
    Claim(
        id="malaria-improves",
        chapter="04_malaria",
        place="Section 3, Figure 3, and the poster",
        sentence="The finite NTK improves with the number of points of the later map that it is given.",
        quantity="slope, in log-log, of the NTK's test MSE against the number of points, from 10 to the most",
        direction="<",
        threshold=0.0,
        paper_value="improves",
    ),
    *(
        Claim(
            id=f"malaria-stagnates{key}",
            chapter="04_malaria",
            place=place,
            sentence=f"Re-training the last layer{how} stagnates as the number of points grows.",
            quantity=f"test MSE of the last layer retrained{how} with the most points, over that with 100",
            direction=">",
            threshold=0.8,
            paper_value="stagnates",
        )
        for key, how, place in (
            ("", " for 100 epochs", "Section 3, Figure 3"),
            ("-converged", " until it has converged", "implied by Appendix F's remark on 1,000 epochs"),
        )
    ),
    *(
        Claim(
            id=f"malaria-{key}",
            chapter="04_malaria",
            place=place,
            sentence=sentence,
            quantity=f"1000 times the test MSE of the NTK with the most points of the later map, minus that of {what}",
            direction="<",
            threshold=0.0,
        )
        for key, place, sentence, what in (
            (
                "adapts",
                "Section 3, Figure 3",
                "Conditioning the network's NTK on points of the later map adapts it to that map.",
                "the network without adaptation",
            ),
            (
                "last-layer",
                "Section 3, Figure 3",
                "The finite NTK is a better transfer model than a retrained last layer.",
                "the last layer retrained for 100 epochs",
            ),
            (
                "last-layer-converged",
                "implied by Appendix F's remark on 1,000 epochs",
                "The finite NTK is better also than a last layer that is trained until it has converged.",
                "the last layer retrained until it has converged",
            ),
            (
                "last-layer-exact",
                "implied by Section 3, Figure 3",
                "The gradients of all layers transfer better than the last layer's features in closed form.",
                "the Bayesian last layer in closed form",
            ),
            (
                "fine-tuning",
                "implied by Appendix F: why not just train a full model?",
                "The closed form predicts better than training on the full network.",
                "full fine-tuning for 100 epochs",
            ),
            (
                "rbf",
                "implied by Section 1",
                "What the network learned from the earlier map is worth more than a kernel that knows nothing of it.",
                "an RBF GP on the same points of the later map alone",
            ),
            (
                "features",
                "Appendix B, footnote 6; Section 2.2",
                "What the network learned from the earlier map makes its NTK a better prior for the later one.",
                "the untrained network's NTK",
            ),
        )
    ),
    Claim(
        id="malaria-coverage",
        chapter="04_malaria",
        place="implied by Section 3: predictive variances in regression",
        sentence="The NTK with the network's own noise knows how sure it is of the later map.",
        quantity="share of the test points inside the central 95 % predictive interval, given the most points",
        direction="in",
        threshold=(0.9, 0.99),
    ),
    Claim(
        id="fisher-error",
        chapter="05_fisher_vector_products",
        place="Appendix D, Figure 5",
        sentence="The relative error of the finite-difference product of PreResNet56 is of the order of 1e-3.",
        quantity="relative error of the forward difference in float32 on the gradient's direction, at the ε that is "
        "best before training, largest of the later stages of training",
        direction="<",
        threshold=10**-2.5,
        paper_value="of the order of 1e-3",
    ),
    Claim(
        id="fisher-constant",
        chapter="05_fisher_vector_products",
        place="Appendix D, Figure 5",
        sentence="That error stays nearly constant throughout training, so that ε can be tuned at its beginning.",
        quantity="the same error, largest over smallest of all stages of training, the first among them",
        direction="<",
        threshold=3.0,
        paper_value="nearly constant",
    ),
    Claim(
        id="fisher-epsilon",
        chapter="05_fisher_vector_products",
        place="Appendix F (ε = 1e-4), Figure 5",
        sentence="ε = 1e-4, the paper's own, is a good choice for a modern network.",
        quantity="relative error of the forward difference in float32 on the gradient's direction at ε = 1e-4, over "
        "that at the best ε, largest of all stages of training",
        direction="<",
        threshold=3.0,
    ),
    Claim(
        id="fisher-regression",
        chapter="05_fisher_vector_products",
        place="Appendix F",
        sentence="ε is very stable for regression losses.",
        quantity="decades of ε in which the forward difference of a squared loss in float32 on the gradient's "
        "direction is within 1 %, smallest of the sinusoid networks",
        direction=">",
        threshold=2.0,
        paper_value="very stable",
    ),
    Claim(
        id="fisher-two-calls",
        chapter="05_fisher_vector_products",
        place="Appendix D",
        sentence="A finite-difference product takes no more than two backward calls.",
        quantity="time of a forward difference over that of one gradient, largest of the five networks",
        direction="<",
        threshold=2.0,
        paper_value="two backward calls",
    ),
    Claim(
        id="fisher-speed",
        chapter="05_fisher_vector_products",
        place="Appendix D, Figure 6",
        sentence="The finite-difference product is typically at least 25 times faster than the autograd product.",
        quantity="time of the product by double backward over that of the forward difference, smallest of the five "
        "networks",
        direction=">",
        threshold=25.0,
        paper_value="at least 25",
    ),
    Claim(
        id="fisher-speed-most",
        chapter="05_fisher_vector_products",
        place="the poster",
        sentence="Finite differences give a thirtyfold speedup on most models.",
        quantity="time of the product by double backward over that of the forward difference, median of the five "
        "networks",
        direction=">",
        threshold=30.0,
        paper_value="30",
    ),
    *(
        Claim(
            id=f"similarity-{key}",
            chapter="06_jacobian_similarity",
            place=place,
            sentence=sentence,
            quantity=f"cosine similarity of {what}",
            direction=">",
            threshold=0.0,
        )
        for key, place, sentence, what in (
            (
                "mnist",
                "the talk of December 2019, Figure 1",
                "MNIST is considerably more similar to KMNIST than to FashionMNIST.",
                "diag JᵀJ, networks of different initialisations: MNIST with KMNIST minus MNIST with FashionMNIST",
            ),
            (
                "kmnist",
                "the talk of December 2019, Figure 1",
                "KMNIST, too, is dissimilar to FashionMNIST.",
                "diag JᵀJ, networks of different initialisations: MNIST with KMNIST minus KMNIST with FashionMNIST",
            ),
            (
                "shared",
                "the talk of December 2019, Figure 1, with one initialisation for all",
                "MNIST is closer to KMNIST than either is to FashionMNIST.",
                "diag JᵀJ, networks of one initialisation: MNIST with KMNIST minus the larger of the two others",
            ),
            (
                "fisher",
                "Section 2.2",
                "The Fisher information's diagonal, too, is informative of the similarity between tasks.",
                "the true Fisher's diagonal, networks of different initialisations: MNIST with KMNIST minus the larger "
                "of the two others",
            ),
            (
                "task2vec",
                "Section 2.2, after Task2vec",
                "One network's Fisher information on each task's data tells which tasks are similar.",
                "one network's true Fisher diagonal on each task's data: MNIST with KMNIST minus the larger of the two "
                "others, mean over the three networks",
            ),
            (
                "beyond-seed",
                "implied by Sections 1 and 2.2",
                "Jacobians are similar because tasks are: two networks of one task are closer than of two tasks.",
                "diag JᵀJ, networks of different initialisations: two networks of one task (mean over tasks) minus "
                "MNIST with KMNIST",
            ),
        )
    ),
    Claim(
        id="similarity-spectra",
        chapter="06_jacobian_similarity",
        place="Section 2.3",
        sentence="The singular values of Jacobians are closer the more similar the tasks are.",
        quantity="mean |log₁₀ ratio| of singular values, equal n: MNIST with KMNIST minus the smaller of the two "
        "others",
        direction="<",
        threshold=0.0,
    ),
    *(
        Claim(
            id=f"similarity-spectra-{key}",
            chapter="06_jacobian_similarity",
            place="Section 2.3",
            sentence=f"The singular values of Jacobian matrices from similar tasks are closely related: {tasks}.",
            quantity=f"mean |log₁₀ ratio| of singular values, equal n, between {tasks}",
            direction="<",
            threshold=0.1,
            paper_value="closely related",
        )
        for key, tasks in (
            ("digits", "MNIST and KMNIST"),
            ("sinusoids", "two sinusoids"),
            ("stations", "two weather stations"),
        )
    ),
)
